"""``python -m fastgrpo.env`` says what is there, and finds an op that is off."""

import pytest
import torch

import fastgrpo
from fastgrpo import env


@pytest.mark.quick
def test_the_report_and_the_self_test(capsys):
    assert env.main() == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].startswith(torch.__version__)
    assert lines["fastgrpo"].split()[0] == fastgrpo.__version__
    assert lines["backend"] in ("torch", "triton")
    assert {"triton", "transformers", "trl", "device", "python"} <= lines.keys()
    assert lines["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda loss: 1.0001 * loss,
        lambda loss: loss * torch.nan,
        lambda loss: loss.detach() + 2 * (loss - loss.detach()),
    ],
)
def test_a_wrong_loss_or_gradient_is_found(wrong, monkeypatch, capsys):
    def off(*arguments, **options):
        result = fastgrpo.grpo_loss(*arguments, **options)
        return result._replace(loss=wrong(result.loss))

    monkeypatch.setattr(env, "grpo_loss", off)
    assert env.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_what_is_not_installed_is_said():
    assert env.version("a-package-nobody-has") == "not installed"
