"""Two gloo processes on a CPU, under DDP and FSDP2: the gradients of one process, and no rank waits for ever."""

import pytest
import torch

pytest.importorskip("accelerate")

import distributed_job
import problems
from processes import run_ranks


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.fixture(autouse=True)
def averaging(request):
    if problems.OLDEST_TORCH and "fsdp2" in request.node.name:
        pytest.skip("FSDP2 of torch 2.8 adds gradients up over gloo where it should average them")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found."""
    output = tmp_path_factory.mktemp("ranks")
    run_ranks(distributed_job.__file__, 2, output, ACCELERATE_USE_CPU="true")
    return [torch.load(output / f"rank{r}.pt", weights_only=False) for r in range(2)]


GRADIENTS = [
    (k, tied, n)
    for k in ("ddp", "ddp, little memory", "fsdp2")
    for tied in (False, True)
    for n in distributed_job.CASES
]


@pytest.mark.works("transformers", "fuse_lm_head: DDP and FSDP2 on two processes, the head a unit of its own too")
@pytest.mark.parametrize(("kind", "tied", "name"), [*GRADIENTS, ("fsdp2, head alone", False, "dapo")])
def test_gradients_of_one_process(ranks, kind, tied, name):
    want = distributed_job.gradients("single", tied, distributed_job.CASES[name])
    got = [rank[kind, tied, name] for rank in ranks]
    assert [g["budget"] for g in got] == [12 if "little" in kind else 24, 24]  # rank 0 alone runs out, both start over
    assert_same(got, want)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_shared_turns_have_the_gradients_of_one_process(ranks, kind):
    want = distributed_job.gradients("single", False, distributed_job.CASES["grpo, kl"], turns=True)
    assert_same([rank[kind, False, "turns"] for rank in ranks], want)


def assert_same(ranks, want):
    everyone = [score for got in ranks for score in got["scores"]]
    for ours, theirs in zip(everyone, want["scores"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for got in ranks:
        assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-5, abs=1e-6)
        assert got["grads"].keys() == want["grads"].keys()
        top = max(g.norm() for g in want["grads"].values())
        for n, g in want["grads"].items():
            assert (got["grads"][n] - g).norm() <= 1e-6 * top, n
            assert (got["grads"][n] - g).norm() <= 1e-5 * max(g.norm(), 1e-2 * top), n


@pytest.mark.parametrize("run", distributed_job.RUNS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_trainer_on_two_ranks(ranks, kind, run):
    """Both ranks end with the same weights, and a resumed run with the same as the uninterrupted one."""
    (first, log), (again, log_again) = ranks[0][kind, run]
    for name, weight in first.items():
        assert weight.equal(ranks[1][kind, run][0][0][name]), name
        assert weight.equal(again[name]), name
    assert log == log_again
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in log if "eval/reward" in row] == [3, 5]
    start = dict(distributed_job.trainer_job.make_model()[0].named_parameters())
    for name, weight in first.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert "lora" in name or (weight - start[plain]).abs().max().gt(0) == (run != "lora"), name
    assert run != "lora" or any(weight.abs().max() > 0 for name, weight in first.items() if "lora_B" in name)
    rows = [row for row in log if "loss" in row]
    if run == "left out":  # other numbers of answers on each rank
        assert all(row["entropy"] > 0 and row["kl"] == 0 for row in rows)
        assert any(row["frac_reward_zero_std"] > 0 for row in rows)
        assert any(row["resampled"] > 0 for row in rows)
        assert any(abs(row["ratio_max"] - 1) > 1e-4 for row in rows)
    else:
        assert log[-2]["kl"] > 0


@pytest.mark.parametrize("run", distributed_job.RUNS)
def test_fsdp2_trains_as_ddp_does(ranks, run):
    (ddp, log), (fsdp, other) = (ranks[0][kind, run][0] for kind in ("ddp", "fsdp2"))
    assert ddp.keys() == fsdp.keys()
    for name, weight in ddp.items():
        torch.testing.assert_close(fsdp[name], weight, rtol=0, atol=2e-4)  # a fifth of one step of Adam
    for a, b in zip(log, other):
        for name in {"kl", "entropy", "loss", "reward", "eval/reward"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_supervised_fine_tuning_of_one_process(ranks, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgrpo.trainer.loop.Accelerator", None)  # set, and put back
    want, expected = distributed_job.fine_tune("single", str(tmp_path), ranks=1)
    (weights, log), (others, _) = (rank[kind, "sft"] for rank in ranks)
    for name, weight in weights.items():
        assert weight.equal(others[name]), name
        torch.testing.assert_close(weight, want[name], rtol=0, atol=1e-4)  # a tenth of one step of Adam
    assert [row["step"] for row in log] == [1, 2, 3, 4, 4]
    for row, one in zip(log, expected):
        for name in {"loss", "eval/loss", "grad_norm", "learnt_tokens", "length", "epoch"} & row.keys():
            assert row[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distillation_of_one_process(ranks, kind, tmp_path, monkeypatch):
    """Also where the teacher's head is gathered for its call alone."""
    monkeypatch.setattr("fastgrpo.trainer.loop.Accelerator", None)  # set, and put back
    want, expected = distributed_job.distil("single", str(tmp_path), ranks=1)
    (weights, log), (others, _) = (rank[kind, "distil"] for rank in ranks)
    for name, weight in weights.items():
        assert weight.equal(others[name]), name
        torch.testing.assert_close(weight, want[name], rtol=0, atol=1e-4)  # a tenth of one step of Adam
    assert [row["step"] for row in log] == [1, 2, 3, 3]
    for row, one in zip(log, expected):
        for name in {"loss", "divergence", "entropy", "eval/divergence", "grad_norm", "length"} & row.keys():
            assert row[name] == pytest.approx(one[name], rel=1e-4), name
    assert log[0]["divergence"] > 0.01
