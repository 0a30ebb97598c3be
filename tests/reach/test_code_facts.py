from slotted import Single, Slotted

from mlx_tune.reach.code_facts import slot_names


def test_slots_have_the_names_they_have_outside():
    assert slot_names(Slotted) == ("_Slotted__private", "seen")
    assert slot_names(Single) == ("only",)
