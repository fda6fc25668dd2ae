"""verl's linear_cross_entropy, alone and with the vocabulary cut over two and three gloo processes."""

import contextlib
import functools
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgrpo import backends, reference
from fastgrpo.integrations import verl
from fastgrpo.integrations.verl import linear_cross_entropy
from fastgrpo.vocab_parallel import own_entries, vocab_parallel_logprobs

import problems
from problems import relative_error
from processes import run_ranks
from watchers import NoSync, forbid_lists

pytest.importorskip("triton")

import vocab_parallel_job as job

CUT = ("weight", "bias")  # what each rank has a part of


@pytest.fixture(scope="module", params=job.RANKS)
def ranks(request, tmp_path_factory):
    """What each of the processes found."""
    output = tmp_path_factory.mktemp("ranks")
    run_ranks(job.__file__, request.param, output)
    return [torch.load(output / f"rank{r}.pt") for r in range(request.param)]


def whole(ranks, name):
    """The ranks' result of one case as one process would give it; what they share is the same to the bit."""
    first = ranks[0][name]
    for rank in ranks:
        assert all(rank[name][k].equal(v) for k, v in first.items() if k not in CUT and v is not None)
    return {k: torch.cat([rank[name][k] for rank in ranks]) if k in CUT and v is not None else v
            for k, v in first.items()}  # fmt: skip


@functools.cache
def of_one(name):
    """The case's result of one process, which two and three are compared with; torch's where it is large."""
    case = job.CASES[name]
    return job.outcome({**case, "backward": "exact", **({"backend": "torch"} if "size" in case else {})})


@pytest.mark.works("verl", "linear_cross_entropy over a tensor-parallel head: two and three processes equal one")
@pytest.mark.parametrize("name", job.CASES)
def test_processes_equal_one(ranks, name):
    case = job.CASES[name]
    skip_without_interpreter(case)
    got, one = whole(ranks, ("outcome", name)), of_one(name)
    assert_close(got, one, case)
    if name in LEFT_OUT:  # or the certificate was of no use
        assert relative_error(got["hidden"], one["hidden"]) > 1e-4
    if case.get("row_tolerance", 1.0) < 1:
        errors = (got["weight"] - one["weight"]).norm(dim=1) / one["weight"].norm(dim=1)
        assert errors.quantile(0.95) <= case["row_tolerance"]
        assert errors.median() <= case["row_tolerance"] / 5


def assert_close(got, one, case, **options):
    for key, want in one.items():
        if want is None:
            assert got[key] is None, key
        else:
            assert relative_error(got[key], want) <= limit(case, key, **options), key


@pytest.mark.parametrize("name", job.SEVERAL)
def test_several_targets_of_processes_equal_one(ranks, name):
    """Top-k: the log-probs, the rest's mass and the gradients, some of the targets on each rank."""
    case = job.SEVERAL[name]
    skip_without_interpreter(case)
    one = job.several({**case, "backward": "exact", **({"backend": "torch"} if "size" in case else {})})
    got = whole(ranks, ("several", name))
    assert_close(got, one, case, part=1)
    if "tolerance" in case:  # or the certificate was of no use
        assert relative_error(got["hidden"], one["hidden"]) > 1e-4


def skip_without_interpreter(case):
    if case.get("backend") == "triton" and not backends.interpreting():
        pytest.skip("where there is a GPU, this process has no interpreter for tensors on a CPU")


LEFT_OUT = (
    "certified", "certified, hinted", "certified, bf16", "certified, triton, hinted", "certified, rows",
    "certified, rows, triton",
)  # fmt: skip


def limit(case, key, part=3):
    if key in ("hidden", *CUT) and "tolerance" in case and not case["entropy"]:
        return case["tolerance"] / part  # the gradients' errors are a few times smaller than that of dlogits
    if case["dtype"] == torch.float64:
        return 1e-12
    if case.get("peak") and key != "logprobs":  # the logits' own rounding differs with the GEMM's shape
        return 1e-5
    # bf16: dX is summed in fp32 and rounded once; a sum of rounded parts would be off by 2e-3
    return 2e-4 if case["dtype"] == torch.bfloat16 and key in ("hidden", *CUT) else 1e-6


@pytest.mark.works("verl", "linear_cross_entropy as verl's Megatron models call it, sequence-parallel hidden gathered")
def test_megatron_call(ranks):
    """verl's callers sum dX themselves, in the backward of their gathering: it must not be summed before."""
    got, want = whole(ranks, "megatron"), job.as_megatron_calls()
    for key, value in want.items():
        assert relative_error(got[key], value) <= 1e-12, key


@pytest.mark.quick
@pytest.mark.works("verl", "linear_cross_entropy alone: log-probs, entropy and gradients of the full logits in fp64")
@pytest.mark.parametrize("name", [n for n, c in job.CASES.items() if c["dtype"] != torch.bfloat16 and "size" not in c])
def test_equals_full_logits(name):
    case = {"reduction": "none", "names": ("hidden", "weight", "bias"), **job.CASES[name]}
    skip_without_interpreter(case)
    got = job.outcome(case)
    hidden, weight, labels, bias, temperature = job.inputs(**{**case, "dtype": torch.float64})
    leaves = problems.with_grad({"hidden": hidden, "weight": weight, "bias": bias}, case["names"])
    z = leaves["hidden"] @ leaves["weight"].T + (0 if bias is None else leaves["bias"])
    z = z * case.get("logit_scale", 1.0)
    z = case["softcap"] * torch.tanh(z / case["softcap"]) if "softcap" in case else z
    z = z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    counted = (labels != -100).double()
    logprobs = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1) * counted
    if case["reduction"] == "mean":
        logprobs = logprobs.sum() / counted.sum()
    g = torch.Generator().manual_seed(1)
    up, up_entropy = torch.randn(2, *labels.shape, generator=g, dtype=torch.float64)
    ((logprobs * up).sum() + (entropy * up_entropy).sum() * case.get("entropy", True)).backward()
    want = {"logprobs": logprobs, "entropy": entropy, **{k: v.grad for k, v in leaves.items() if v is not None}}
    for key, value in want.items():
        if value is None:
            assert got[key] is None, key
        else:
            bound = 1e-12 if case["dtype"] == torch.float64 else 1e-5 if case.get("peak") else 1e-6
            assert relative_error(got[key], value.detach()) <= bound, key


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lead", "shape"),
    [((1, 15), (1, 15)), ((15,), (15,)), ((15, 1), (1, 15)), ((1, 15), (15,)), ((3, 5), (3, 5))],
)
def test_shapes(lead, shape):
    """FSDP's, flat, Megatron's, and what flattening allows: the result has the labels' shape."""
    hidden, weight, labels, _ = problems.head(15, 53, 24)
    logprobs, entropy = linear_cross_entropy(hidden.view(*lead, 24), weight, labels.view(shape), 0.7, "none")
    want = reference.linear_logprobs(hidden, weight, labels, temperature=0.7, return_entropy=True)
    assert logprobs.shape == entropy.shape == shape
    torch.testing.assert_close(logprobs.view(-1), want.logprobs)
    torch.testing.assert_close(entropy.view(-1), want.entropy)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5), (15,), (1, 15), (), (1,)])
def test_temperatures(shape):
    hidden, weight, labels, _ = problems.head(15, 53, 24)
    temperature = torch.rand(shape, dtype=torch.float64) + 0.5
    by_token = temperature.view(-1, 1).expand(3, 5) if shape in ((3,), (3, 1)) else temperature
    by_token = by_token.reshape(-1) if by_token.numel() > 1 else by_token.expand(15)
    got, _ = linear_cross_entropy(hidden.view(3, 5, 24), weight, labels.view(3, 5), temperature)
    want = reference.linear_logprobs(hidden, weight, labels, temperature=by_token).logprobs
    torch.testing.assert_close(got.view(-1), want)


def test_reductions():
    hidden, weight, labels, _ = problems.head(9, 53, 24)
    labels[3] = -100
    each, entropy = linear_cross_entropy(hidden, weight, labels)
    for reduction, want in (("sum", each.sum()), ("mean", each.sum() / 8), ("MEAN", each.sum() / 8)):
        got, same = linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
        torch.testing.assert_close(got, want)
        assert same.equal(entropy)


def test_certified_without_an_entropy_gradient():
    """The forward asks for the entropy in any case; a loss that does not use it must not pay the exact backward."""
    hidden, weight, labels, _ = problems.head(256, 4096, 64, torch.float32, peak=14.0)
    weight.requires_grad_()
    exact, loose = ({"backward": "exact"}, {"backward": "certified", "tolerance": 0.3, "row_tolerance": 1.0})
    grads = [torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, **o).logprobs.sum(), weight)[0]
             for o in (exact, loose)]  # fmt: skip
    assert 1e-5 < relative_error(grads[1], grads[0]) < 0.3


BAD = {
    "labels": ({"labels": torch.zeros(5, 3, dtype=torch.int64)}, ValueError, r"labels must be .* got \(5, 3\)"),
    "labels, too few": ({"labels": torch.zeros(14, dtype=torch.int64)}, ValueError, "labels must be"),
    "float labels": ({"labels": torch.zeros(3, 5)}, ValueError, "labels must be an integer tensor"),
    "an id beyond": ({"labels": torch.full((3, 5), 53)}, ValueError, r"in \[0, 53\).* got 53"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
    "temperatures": ({"temperature": torch.ones(4)}, ValueError, r"temperature must be .* got shape \(4,\)"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'sum', 'mean'"),
    "no reduction": ({"reduction": None}, ValueError, "reduction must be"),
    "group": ({"process_group": 0}, TypeError, "group must be a torch.distributed.ProcessGroup"),
    "weight": ({"weight": torch.zeros(53, 23)}, ValueError, "weight must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    bad, error, message = BAD[name]
    hidden, weight, labels, _ = problems.head(15, 53, 24, torch.float32)
    good = {"hidden": hidden.view(3, 5, 24), "weight": weight, "labels": labels.view(3, 5)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **bad})


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_bad_shards(group):
    hidden, weight, labels, _ = problems.head(15, 53, 24)
    with pytest.raises(ValueError, match=r"shard_sizes must be 1 sizes with 53 at rank 0, got \[52\]"):
        vocab_parallel_logprobs(hidden, weight, labels, group=group, shard_sizes=(52,))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 53\) .* got 53"):
        vocab_parallel_logprobs(hidden, weight, labels.clone().fill_(53), group=group)
    with pytest.raises(TypeError, match="group must be"):
        vocab_parallel_logprobs(hidden, weight, labels, group=None)


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_unknown_ids_and_no_waiting(group, backend, backward, monkeypatch):
    """Where the host does not look at values an id that no rank has gives NaN; on the Triton backend it never waits
    (but for the block sizes of the certified backward)."""
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    hidden, weight, labels, _ = problems.head(15, 53, 24, torch.float32)
    hidden.requires_grad_()
    labels[3], labels[4], labels[5] = 53, -7, -100
    want = reference.linear_logprobs(hidden.detach(), weight, labels.clamp(0, 52), return_entropy=True)
    options = {"group": group, "return_entropy": True, "backend": backend, "backward": backward}
    with monkeypatch.context() as m, NoSync() if backend == "triton" else contextlib.nullcontext():
        if backend == "triton":
            forbid_lists(m)
        out = vocab_parallel_logprobs(hidden, weight, labels, **options)
        if backward == "exact":
            out.logprobs[6:].sum().backward()
    if backward == "certified":
        out.logprobs[6:].sum().backward()
    assert out.logprobs[3:5].isnan().all()
    assert out.entropy[3:5].isnan().all()
    assert out.logprobs[5] == out.entropy[5] == 0
    for got, truth in zip(out, want):
        torch.testing.assert_close(got[[0, 1, 2, *range(6, 15)]], truth[[0, 1, 2, *range(6, 15)]])
    assert hidden.grad.isfinite().all()


def test_no_entry_is_taken_for_an_ignored_one():
    entries = own_entries(torch.tensor([0, 20, 119, 120, 137, 138, -1, -100]), 120, 18)
    assert entries.tolist() == [-1, -1, -1, 0, 17, -1, -1, -100]


def test_gradient_once(group):
    hidden, weight, labels, _ = problems.head(4, 53, 24)
    hidden.requires_grad_()
    out = vocab_parallel_logprobs(hidden, weight, labels, group=group)
    (grad,) = torch.autograd.grad(out.logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.fixture
def fake_verl(monkeypatch):
    """Modules under verl's names with what ``apply`` touches: its function, and a module that imported it."""

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
            raise AssertionError("verl's own was called")

    path = ("verl", "verl.utils", "verl.utils.kernel", verl.KERNEL, "verl.models", "verl.models.mcore_fused")
    modules = {name: types.ModuleType(name) for name in path}
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    kernel = modules[verl.KERNEL]
    kernel.LinearCrossEntropy, kernel.linear_cross_entropy = LinearCrossEntropy, LinearCrossEntropy.apply
    modules["verl.models.mcore_fused"].linear_cross_entropy = kernel.linear_cross_entropy
    return kernel, modules["verl.models.mcore_fused"]


def dense_call(self, hidden_states, rolled_labels, temperature):
    """The call of verl 0.9.1's forward_with_triton_backend: imported inside, five positional arguments."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_states, self.lm_head.weight, rolled_labels, temperature, "none")


@pytest.mark.works("verl", "apply(): a stand-in for verl's kernel module, called as verl 0.9.1's models call it")
def test_apply(fake_verl):
    kernel, importer = fake_verl
    theirs = kernel.linear_cross_entropy
    hidden, weight, labels, _ = problems.head(15, 53, 24, torch.float32)
    model = types.SimpleNamespace(lm_head=types.SimpleNamespace(weight=weight))
    with pytest.raises(AssertionError, match="verl's own"):
        dense_call(model, hidden[None], labels[None], 0.7)
    undo = verl.apply()
    verl.apply().close()  # once more changes nothing
    assert kernel.linear_cross_entropy is importer.linear_cross_entropy is verl.call_as_verl
    log_probs, entropy = dense_call(model, hidden[None], labels[None], 0.7)
    want = reference.linear_logprobs(hidden, weight, labels, temperature=0.7, return_entropy=True)
    torch.testing.assert_close(log_probs.squeeze(0), want.logprobs)  # as its engine takes them
    torch.testing.assert_close(entropy.squeeze(0), want.entropy)
    undo.close()
    assert kernel.linear_cross_entropy is importer.linear_cross_entropy is theirs


def test_patch_module(fake_verl):
    """What VERL_USE_EXTERNAL_MODULES imports in each process."""
    sys.modules.pop("fastgrpo.integrations.verl_patch", None)
    importlib.import_module("fastgrpo.integrations.verl_patch")
    assert fake_verl[0].linear_cross_entropy is verl.call_as_verl


def test_another_verl_is_refused(fake_verl):
    kernel, _ = fake_verl
    theirs = kernel.linear_cross_entropy
    kernel.LinearCrossEntropy.forward = staticmethod(lambda ctx, hidden, weight, labels, softcap: None)
    with pytest.raises(ImportError, match=r"must take \['hidden', .* found \['hidden', 'weight', 'labels', 'softcap'"):
        verl.apply()
    assert kernel.linear_cross_entropy is theirs


def test_without_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"fastgrpo\[verl\]"):
        verl.apply()


@pytest.fixture
def real_verl(monkeypatch):
    """The installed verl's modules without its __init__ files, which want Ray and more; real memory for models."""
    monkeypatch.undo()
    spec = importlib.util.find_spec("verl")
    if spec is None:
        pytest.skip("verl is not installed")
    root = Path(spec.submodule_search_locations[0])
    for name in ("verl", "verl.utils", "verl.utils.kernel", "verl.models", "verl.models.transformers"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    yield
    for name in [n for n in sys.modules if n.startswith("verl.")]:
        sys.modules.pop(name)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_verl_own_models(real_verl, temperature):
    """verl's model forward with its Triton backend replaced, against the same with its torch backend."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.dense_common import forward_with_torch_backend, forward_with_triton_backend

    undo = verl.apply()
    config = Qwen2Config(vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = Qwen2ForCausalLM(config)
    ids = torch.randint(0, 61, (2, 9))
    results = []
    for forward in (forward_with_torch_backend, forward_with_triton_backend):
        model.zero_grad()
        out = forward(model, input_ids=ids, return_dict=True, temperature=temperature)
        (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
        results.append((out.log_probs, out.entropy, *(p.grad for p in model.parameters())))
    undo.close()
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
