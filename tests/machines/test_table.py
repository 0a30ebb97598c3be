from __future__ import annotations

import pytest

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.machines.table import (
    find_machine,
    given_budget,
    mac,
    mac_sizes,
    machine_names,
    machine_of_memory,
    smallest_mac,
    this_machine,
)

GB = 2**30


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_is_found_by_its_name(name):
    machine = find_machine(name)
    assert machine.name == name
    assert 0 < machine.budget_bytes < machine.usable_bytes <= machine.memory_bytes
    assert machine.bandwidth_gb_s
    assert machine.source
    assert find_machine(name.lower().replace(" gb", "gb")) == machine


@pytest.mark.parametrize("name", ["m3 max 64gb", "Apple M3 Max, 64 GB", "MacBook Pro M3 Max 64", "M3-Max (64GB)"])
def test_makers_case_and_blanks_do_not_matter(name):
    if name.endswith("64"):
        name += "GB"
    assert find_machine(name).name == "M3 Max 64 GB"


def test_working_sets_are_those_that_were_read_and_else_a_rule():
    assert (mac(32).usable_bytes, mac(32).reading) == (22906503168, True)
    assert (mac(36).usable_bytes, mac(36).reading) == (27 * GB, False)
    assert (mac(24).usable_bytes, mac(24).reading) == (16 * GB, False)
    for gb in mac_sizes():  # no reading is far from the rule
        share = 2 / 3 if gb <= 32 else 3 / 4
        assert mac(gb).usable_bytes == pytest.approx(share * gb * GB, rel=0.001)


def test_a_card_has_decimal_gigabytes():
    card = find_machine("NVIDIA H200")
    assert (card.backend, card.memory_bytes, card.reading) == ("cuda", 141_000_000_000, False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("M3 Mxa 64GB", "The nearest are M3 Max 64 GB"),
        ("RTX 4900", "RTX 4090 24 GB"),
        ("abacus", "It has M1 8 GB to"),
        ("M3 Max", "say with how much memory, such as M3 Max 36GB. It comes with 36, 48, 64, 96 and 128 GB"),
        ("M3 Max 72GB", "M3 Max comes with 36, 48, 64, 96 and 128 GB"),
        ("A100", "It comes with 40 and 80 GB"),
    ],
)
def test_a_name_that_is_not_there_gets_the_nearest_ones(name, text):
    with pytest.raises(InvalidArgumentError, match=text):
        find_machine(name)


@pytest.mark.parametrize("size", ["64GB", "64GiB", "64G", 64 * GB, 64 * 10**9])
def test_memory_names_a_mac(size):
    assert machine_of_memory(size) == find_machine("Mac 64GB")


def test_too_little_memory_is_refused():
    with pytest.raises(InvalidArgumentError, match="less than 1 GB"):
        machine_of_memory("64MB")


def test_the_smallest_mac_is_the_first_whose_budget_is_enough():
    assert smallest_mac(1) == 8
    assert smallest_mac(mac(64).budget_bytes) == 64
    assert smallest_mac(mac(64).budget_bytes + 1) == 96
    assert smallest_mac(10**15) is None


def test_a_budget_that_was_chosen_is_taken_as_it_is():
    machine = given_budget("20GB", find_machine("Mac 32GB"))
    assert (machine.budget_bytes, machine.name, machine.source) == (20 * 10**9, "Mac 32 GB", "given")
    with pytest.raises(InvalidArgumentError, match="leaves nothing"):
        given_budget(0, machine)


def test_this_machine_has_what_is_free_on_it():
    machine = this_machine()
    assert 0 < machine.budget_bytes <= machine.usable_bytes <= machine.memory_bytes * 1.01
    assert machine.reading
    assert machine.name in str(machine)
