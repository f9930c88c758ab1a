"""Filters by name: what a text builds, which options reach it, and how a wrong one is refused."""

import sys
import types

import numpy as np
import pytest
import torch

from freqmask.errors import UserError
from freqmask.filters import (
    FILTERS,
    Energy,
    Filter,
    HighPass,
    LowPass,
    OneOf,
    RandomBins,
    RCom,
    Rings,
    build_filter,
)
from freqmask.spectrum import power


def test_a_second_radius_makes_bands():
    names = build_filter("fixed", radius=4, second_radius=9).names
    assert names == ["bandstop", "bandpass"]


def test_options_reach_the_filters_that_take_them():
    assert build_filter("lowpass", radius=7).radius == 7
    assert build_filter("lowpass(radius=8)", radius=7).radius == 8
    assert (
        build_filter("com", com_fractions=[0.2]).settings()["filters"][0].startswith("com(fractions=(0.2,)")
    )


class Wedge(Filter):
    """What somebody else's filter looks like."""

    def __init__(self, angle=30):
        super().__init__()
        self.angle = angle

    def keep(self, spectrum, size, keys):
        return torch.ones_like(power(spectrum[:, :1]))


def test_an_import_path_builds_somebody_elses_filter(monkeypatch):
    Wedge.__module__ = "mylab.filters"
    for name in ("mylab", "mylab.filters"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mylab.filters"].Wedge = Wedge
    filter = build_filter("mylab.filters:Wedge(angle=45)")
    assert filter.angle == 45
    assert filter.describe() == "mylab.filters:Wedge(angle=45)"
    both = build_filter("oneof(['mylab.filters:Wedge(angle=45)', 'com()'])")
    assert build_filter(both.describe()).describe() == both.describe()


class Row(LowPass):
    """Somebody else's, derived from one of ours: keeps the row of DC alone."""

    def keep(self, spectrum, size, keys):
        keep = torch.zeros_like(spectrum.real[:, :1])
        keep[..., 0, :] = 1
        return keep


class RestOfRow(HighPass):
    """The same of a complement."""

    keep = Row.keep


@pytest.mark.parametrize("kind", [Row, RestOfRow])
def test_what_is_derived_from_a_filter_of_ours_is_described_and_mixed_as_itself(kind, monkeypatch):
    monkeypatch.setattr(kind, "__module__", "mylab.filters")
    for name in ("mylab", "mylab.filters"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules["mylab.filters"], kind.__name__, kind)
    filter, images, keys = kind(radius=4), torch.rand(3, 1, 16, 16), torch.arange(3)
    expected = torch.zeros(3, 1, 16, 9)
    expected[:, :, 0] = 1
    description = f"mylab.filters:{kind.__name__}(radius=4, softness=0.0, edge='sigmoid')"
    assert filter.describe() == description
    assert torch.equal(build_filter(description)(images, keys).keep, expected)
    for beside in (LowPass(4), HighPass(4)):
        assert torch.equal(OneOf([beside, filter], [0, 1])(images, keys).keep, expected)


@pytest.mark.parametrize(
    ("filter", "description"),
    [
        (LowPass(np.float32(3.2)), "lowpass(radius=3.2, softness=0.0, edge='sigmoid')"),
        (HighPass(np.int64(4)), "highpass(radius=4, softness=0.0, edge='sigmoid')"),
        (
            Rings(np.linspace(4, 16, 3)),
            "rings(edges=(4.0, 10.0, 16.0), share=0.5, softness=0.0, edge='sigmoid')",
        ),
        (RandomBins(np.float32(0.1)), "randombins(fraction=0.1)"),
        (RCom(np.array([0.01, 0.1])), "rcom(fractions=(0.01, 0.1), magnitude='luma')"),
        (
            OneOf([LowPass(2), Energy(np.float64(0.9))], np.array([1, 3])),
            "oneof(filters=[\"lowpass(radius=2, softness=0.0, edge='sigmoid')\", "
            "\"energy(share=0.9, magnitude='luma')\"], weights=[1.0, 3.0])",
        ),
    ],
)
def test_a_filter_of_numpys_numbers_is_described_by_plain_ones_and_built_again(filter, description):
    assert filter.describe() == description
    keys, images = torch.arange(3), torch.rand(3, 3, 34, 40)
    assert torch.equal(build_filter(description)(images, keys).keep, filter(images, keys).keep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lowpas", "did you mean 'lowpass'"),
        ("low-pass", "plain arguments"),
        ("high_pas", "did you mean 'highpass'"),
        ("lowpass(radiu=3)", "did you mean 'radius'"),
        ("lowpass(radius=120)", "at most 112"),
        ("lowpass(radius=-1)", "radius (-1) must be"),
        ("lowpass(radius='big')", "'auto'"),
        ("lowpass(radius=__import__('os').getpid())", "plain arguments"),
        ("[x for x in 'ab']", "plain arguments"),
        ("lowpass(", "plain arguments"),
        ("com(fractions=[2])", "above 0 and at most 1"),
        ("com(magnitude='lume')", "did you mean 'luma'"),
        ("bandpass(low=9, high=4)", "low below high"),
        ("rings(edges=[4, 2])", "rising"),
        ("rings(edges='abc')", "edges ('abc') must be radii or 'auto'"),
        ("rings(share=0)", "share (0)"),
        ("energy(share=1.5)", "share (1.5)"),
        ("randombins(fraction=0)", "fraction"),
        ("oneof([])", "must list filters"),
        ("oneof(['com()'], weights=[1, 2])", "equally many"),
        ("oneof(['com()', 'rcom()'], weights=[0, 0])", "not all 0"),
        ("fixed(low_pass_share=2)", "low_pass_share (2)"),
        ("fixed(size=3)", "size"),
        ("fixed(second_radius=30)", "radius ('auto') must be a number"),
        ("nowhere.at.all:Filter", "must be importable"),
        ("torch.nn:Linear(1, 1)", "derived from"),
        ("lowpass(softness=-1)", "softness (-1)"),
        ("lowpass(softness=1, edge='sigmoit')", "did you mean 'sigmoid'"),
        ("com(fractions=0.01)", "it takes fractions=(0.005, 0.01, 0.05), magnitude='luma'"),
        ("com(fractions='ab')", "filter 'com' got an argument of a wrong kind"),
        ("com(magnitude=3)", "filter 'com' got an argument of a wrong kind"),
        ("highpass(radius=[8])", "filter 'highpass' got an argument of a wrong kind"),
        ("lowpass(radius=None)", "it takes radius='auto'"),
        ("rings(edges=8)", "it takes edges='auto'"),
        ("energy('most')", "it takes share=0.9"),
        ("bandpass(low=1, high=2, softness='a')", "it takes low, high, softness=0.0"),
        ("fixed(low_pass_share='auto')", "it takes radius, second_radius, low_pass_share"),
        ("oneof([1, 2])", "must list filters"),
        ("oneof(['com()', 'rcom()'], weights=1)", "it takes filters, weights=None"),
        ("oneof(['com(fractions=0.01)'])", "filter 'com' got an argument of a wrong kind"),
    ],
)
def test_a_wrong_description_is_one_sentence_with_a_way_out(text, words):
    with pytest.raises(UserError) as raised:
        build_filter(text, 224)
    assert words in str(raised.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="did you mean 'radius'"):
        build_filter("fixed", radios=3)


def test_every_name_is_listed():
    assert set(FILTERS) >= {"lowpass", "highpass", "bandpass", "bandstop", "rings", "com", "rcom", "energy"}
    assert all(kind.name == name for name, kind in FILTERS.items())
