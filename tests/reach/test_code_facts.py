from mlx_tune.reach.code_facts import slot_names


class Slotted:
    __slots__ = ("__private", "__weakref__", "seen")

    def __init__(self):
        self.seen = [1]
        self.__private = "a"


class Single:
    __slots__ = "only"


def test_slots_have_the_names_they_have_outside():
    assert slot_names(Slotted) == ("_Slotted__private", "seen")
    assert slot_names(Single) == ("only",)
