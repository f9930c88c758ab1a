"""``freqmask reconstruct`` as a user types it."""

import pytest
from tiny_runs import make_photographs, make_run

import freqmask
from freqmask.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mfm-vit").path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs"))


def test_a_mixture_gives_a_table_and_a_row_for_each_filter(run, photographs, tmp_path, capsys):
    images = [str(photographs / "cats" / name) for name in ("1.png", "3.png")]
    out = tmp_path / "x.png"
    main(["reconstruct", str(run), *images, "--out", str(out)])
    said = capsys.readouterr().out
    assert "highpass: PSNR in dB, mean of 2 images" in said
    assert "lowpass: PSNR in dB" in said
    assert "0 to 1" in said
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_twin_takes_a_filter(run, photographs, tmp_path, capsys):
    freqmask.reconstruct(
        str(run),
        [str(photographs / "dogs" / "0.png")],
        filter="bandpass(low=2, high=6)",
        out=str(tmp_path / "x.png"),
    )
    assert "bandpass(low=2" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["lowpass(radius=4, softness=0.5)", "bandpass(low=2,high=5,softness=0.25)"])
@pytest.mark.parametrize("command", ["reconstruct", "spectra"])
def test_captions_of_long_names_stay_above_their_pictures(
    run, photographs, tmp_path, monkeypatch, command, text
):
    image = tmp_path / f"{'a-long-name-' * 3}.png"
    image.write_bytes((photographs / "dogs" / "0.png").read_bytes())
    sheets = []
    for module in ("commands.sheets", "pretraining.figures"):
        monkeypatch.setattr(
            f"freqmask.{module}.save_figure", lambda figure, path: sheets.append(figure) or path
        )
    filter = ("--filter" if command == "reconstruct" else "--filters", text)
    main([command, *([str(run)] if command == "reconstruct" else []), str(image), *filter])
    lines = [line for axis in sheets[0].axes for line in axis.get_title().splitlines()]
    assert any(line.startswith(text.partition("(")[0]) for line in lines)
    assert max(map(len, lines)) <= 28


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cats/9.png"], "cannot be read"),
        (["cats/1.png", "--out", "x.jpg"], "must be a .png"),
        (["cats/1.png"] * 9, "1 to 8 files"),
        (["cats/1.png", "--filter", "lopass"], "did you mean 'lowpass'"),
        ([], "image"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, photographs, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(photographs)
    with pytest.raises(SystemExit) as left:
        main(["reconstruct", str(run), *words])
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (photographs / "reconstruction.png").exists()
