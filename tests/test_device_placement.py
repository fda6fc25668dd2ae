"""Everything a GPU would hold is made on it, and the host waits only where it must: on :mod:`stand_in_cuda`."""

import copy
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from stand_in_cuda import DEVICE, StandInCuda

from fastgrpo import GRPOLossConfig, backends, grpo_loss, linear_logprobs, lora
from fastgrpo import loss as loss_module
from fastgrpo.config import LOSS_TYPES
from fastgrpo.diagnostics import token_diagnostics
from fastgrpo.logprobs import head_logprobs

B, T, D, V = 4, 6, 32, 50
g = torch.Generator().manual_seed(3)
HIDDEN, WEIGHT, BIAS = (torch.randn(*shape, generator=g) for shape in ((B, T, D), (V, D), (V,)))
LOW, UP = 0.1 * torch.randn(3, D, generator=g), 0.1 * torch.randn(V, 3, generator=g)
TARGETS = torch.randint(0, V, (B, T), generator=g)
TARGETS[0, 0] = -100
OLD = -3 * torch.rand(B, T, generator=g)
NEAR, REF = OLD + 0.1 * torch.randn(B, T, generator=g), -3 * torch.rand(B, T, generator=g)
MASK, ADVANTAGES = (torch.rand(B, T, generator=g) > 0.2).long(), torch.randn(B, generator=g)
KEPT = [sorted({max(int(x), 0), 1, 2, 3}) for x in TARGETS.flatten()]
SUPPORT = torch.tensor([*itertools.chain(*KEPT)]), torch.tensor([0, *map(len, KEPT)]).cumsum(0)


@pytest.fixture
def cuda():
    with StandInCuda() as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    """The kernels need a real GPU."""
    monkeypatch.setattr(backends, "choose", lambda backend, hidden: "torch")


def both(cuda, function, *leaves):
    """``function(put, *leaves)`` -> what it gives and the leaves' gradients, here and on the stand-in."""
    results = []
    for put in (torch.Tensor.clone, cuda.put):
        mine = [put(x.detach()).requires_grad_() for x in leaves]
        out = [x for x in function(put, *mine) if x is not None]
        sum(x.sum() for x in out if x.requires_grad).backward()
        results.append([x.detach() for x in out] + [x.grad for x in mine if x.grad is not None])
    assert all(x.is_cuda for x in results[1])
    return results


def assert_alike(here, there, tolerance=1e-5):
    for a, b in zip(here, there, strict=True):
        assert a.dtype == b.dtype
        error = (a.double() - b.inner.double()).norm() / a.double().norm().clamp(min=1e-6)
        assert error <= tolerance, error


def test_the_stand_in_refuses_what_a_gpu_would(cuda):
    x = cuda.put(torch.arange(3.0))
    assert x.device == torch.zeros(1, device=DEVICE).device == torch.tensor([1], device="cuda").device == DEVICE
    ones = torch.ones(3)
    for wrong in (lambda: x + ones, lambda: torch.stack([x[0], torch.ones(())]), lambda: ones[x.long()],
                  lambda: x @ ones, lambda: ones.mul_(x), x.numpy):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (x * torch.tensor(2.0) + 1).cpu().tolist() == [1, 3, 5]  # a number may be anywhere
    cuda.waits.clear()
    (x * 2 + x.new_zeros(3)).sum(), torch.where(x > 1, x, 0.0), x.index_select(0, torch.arange(2, device=x.device))
    assert cuda.waits == []
    for waits in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool(x[0] > 1), x.tolist,
                  lambda: torch.tensor([1.0], device="cuda"), lambda: x.copy_(torch.ones(3)), x.cpu):  # fmt: skip
        cuda.waits.clear()
        waits()
        assert cuda.waits


CASES = {
    "plain": {},
    "options": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "bias": BIAS, "return_entropy": True},
    "temperatures": {"temperature": torch.rand(B, T, generator=g) + 0.5},
    "certified": {"backward": "certified", "tolerance": 0.1, "old_logprobs": NEAR},
    "lora": {"lora": 2.0},
    "lora, certified": {"lora": 2.0, "backward": "certified", "tolerance": 0.1},
    "support": {"lora": 2.0, "support": SUPPORT, "return_entropy": True},
}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_logprobs(cuda, name, dtype):
    """16 bits: dlogits are rounded to the operands' dtype on CUDA, whose GEMMs return their fp32 accumulator."""

    def run(put, hidden, weight, low, up):
        options = {k: put(v) if isinstance(v, torch.Tensor) else v for k, v in CASES[name].items()}
        if "lora" in options:
            options["lora"] = (low, up, options["lora"])
        if "support" in options:
            options["support"] = tuple(map(put, SUPPORT))
        return linear_logprobs(hidden, weight, put(TARGETS), **options)

    here, there = both(cuda, run, *(x.to(dtype) for x in (HIDDEN, WEIGHT, LOW, UP)))
    assert_alike(here, there, {torch.bfloat16: 6e-3, torch.float16: 8e-4}.get(dtype, 1e-5))


def test_amd_has_no_gemm_with_the_accumulator_s_dtype(cuda, monkeypatch):
    """torch refuses mm(out_dtype=) there, and the tensors are on "cuda"."""
    x = cuda.put(HIDDEN)
    assert lora.has_native(x) == (torch.version.hip is None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not lora.has_native(x)


SETTINGS = (
    {},
    {"beta": 0.1, "off_policy_mask_threshold": 0.05, "importance_sampling_level": "sequence"},
    {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_does_not_wait_beside_the_op(cuda, loss_type, packed, monkeypatch):
    """Numbers may come as tensors on the CPU, also of shape (1,)."""

    def op(*args, **kwargs):  # the torch backend waits for the number of counted rows; this is about the rest
        count = len(cuda.waits)
        out = head_logprobs(*args, **kwargs)
        del cuda.waits[count:]
        return out

    monkeypatch.setattr(loss_module, "head_logprobs", op)
    for settings in SETTINGS:
        config = GRPOLossConfig(loss_type=loss_type, max_completion_length=9, **settings)
        numbers = [{}]
        if not settings:  # they divide the sum, whatever is in it
            numbers += [{"num_items": torch.tensor(7)}, {"num_items": torch.tensor([7.0])}]
        numbers += [{"entropy_threshold": torch.tensor([1.0])}] if "top_entropy_quantile" in settings else []
        for number in numbers:

            def run(put, hidden, weight, config=config, number=number):
                def flat(x):
                    return put(x.flatten() if packed else x)

                known = {"mask": MASK, "old_logprobs": OLD, "ref_logprobs": REF, "sampling_logprobs": NEAR}
                known = {name: flat(x) for name, x in known.items()}
                if packed:
                    known["cu_seqlens"] = put(torch.arange(0, B * T + 1, T, dtype=torch.int32))
                result = grpo_loss(
                    hidden.flatten(0, 1) if packed else hidden, weight, flat(TARGETS), put(ADVANTAGES), config,
                    importance_weights=put(ADVANTAGES.abs()), **known, **number,
                )  # fmt: skip
                assert put is torch.Tensor.clone or cuda.waits == [], cuda.waits
                return result.loss, result.logprobs, result.entropy, *result.metrics.values()

            assert_alike(*both(cuda, run, HIDDEN, WEIGHT))
            cuda.waits.clear()


@pytest.mark.parametrize("options", [{}, {"outputs": ("is_top1",), "known": True}, {"softcap": 3.0}])
def test_diagnostics(cuda, options):
    out = linear_logprobs(HIDDEN, WEIGHT, TARGETS, BIAS, return_entropy=True)
    options, known = {k: v for k, v in options.items() if k != "known"}, "known" in options
    results = []
    for put in (torch.Tensor.clone, cuda.put):
        given = {"logprobs": put(out.logprobs), "entropy": put(out.entropy)} if known else {}
        results.append(token_diagnostics(*map(put, (HIDDEN, WEIGHT, TARGETS, BIAS)), **given, **options))
    assert_alike(*([x for x in r if x is not None] for r in results))
    assert set(cuda.waits) == {"nonzero"}  # for the rows to visit, and no more


@pytest.mark.quick
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_a_shared_vocabulary(cuda, backward, monkeypatch):
    """One rank's part of two halves, sums over the ranks left out: where its tensors are is the same with more."""
    from fastgrpo import vocab_parallel

    monkeypatch.setattr(vocab_parallel, "check_group", lambda group: None)
    sent = []
    for name, value in (("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(vocab_parallel.dist, name, lambda group, value=value: value)
    monkeypatch.setattr(vocab_parallel.dist, "all_reduce", lambda x, **_: sent.append(x))

    def run(put, hidden, weight):
        options = {"backward": backward, "tolerance": 0.1, "old_logprobs": put(NEAR), "return_entropy": True}
        return vocab_parallel.vocab_parallel_logprobs(hidden, weight, put(TARGETS), group=None, **options)

    assert_alike(*both(cuda, run, HIDDEN, WEIGHT))
    assert {x.is_cuda for x in sent[len(sent) // 2 :]} == {True}
    assert all(x.is_contiguous() for x in sent)  # NCCL takes no other


@pytest.mark.quick
def test_verl(cuda):
    from fastgrpo.integrations import verl

    for reduction in ("none", "sum", "mean"):

        def run(put, hidden, weight, reduction=reduction):
            return verl.linear_cross_entropy(hidden, weight, put(TARGETS), put(ADVANTAGES.abs() + 0.1), reduction)

        assert_alike(*both(cuda, run, HIDDEN, WEIGHT))


@pytest.mark.quick
@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
def test_liger(cuda, loss_type, grad_in_forward):
    from fastgrpo.integrations.liger import FusedLinearGRPOLoss

    def run(put, hidden, weight, bias):
        module = FusedLinearGRPOLoss(loss_type=loss_type, grad_in_forward=grad_in_forward, log_entropy=True)
        loss, metrics = module(
            hidden, weight, put(TARGETS.clamp(min=0)), put(MASK), put(ADVANTAGES), bias, ref_input=put(HIDDEN + 0.1),
            ref_weight=put(WEIGHT), old_per_token_logps=put(OLD), num_items_in_batch=torch.tensor([20]),
        )  # fmt: skip
        return loss, *metrics, module.last.entropy

    assert_alike(*both(cuda, run, HIDDEN, WEIGHT, BIAS), tolerance=1e-4)


def test_trl(cuda):
    pytest.importorskip("trl")
    from fastgrpo.integrations import trl

    def run(put, hidden, weight):
        options = {"whole_fp32": False, "bias": None, "return_entropy": True}
        return trl.head_logprobs(hidden, weight, targets=put(TARGETS[:, 1:]), near_logps=put(NEAR[:, 2:]), **options)

    assert_alike(*both(cuda, run, HIDDEN, WEIGHT))


def move(model, cuda):
    """A copy whose parameters and buffers are on the stand-in."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else torch.nn.Parameter(cuda.put(p.data), p.requires_grad)
        for name, x in module._buffers.items():
            module._buffers[name] = None if x is None else cuda.put(x)
    return model


ACCELERATOR = SimpleNamespace(
    print=print,
    device=DEVICE, num_processes=1, autocast=nullcontext, no_sync=lambda model: nullcontext(),
    backward=torch.Tensor.backward,
)  # fmt: skip


@pytest.fixture
def work(monkeypatch):
    """tests/test_learner.py's model and episodes; the fixture's memory is real, as there."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    monkeypatch.undo()
    monkeypatch.setattr(backends, "choose", lambda backend, hidden: "torch")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    import test_learner

    return test_learner


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "top_entropy_quantile": 0.4}])
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"offload": True}])
def test_learner(work, settings, options):
    """A whole step of a transformers model: scores, then gradients."""
    from fastgrpo.trainer.learner import Learner

    config, model, episodes = GRPOLossConfig(**settings), work.make_model(), work.make_episodes(importance=True)
    work.set_old(model, episodes, config)
    loss, want, _ = work.learner_gradients(model, episodes, config, budget=64, **options)
    with StandInCuda() as cuda:
        there = move(model, cuda)
        learner = Learner(there, ACCELERATOR, config, budget=64, **options)
        assert all(x.device.type == "cpu" for x in learner.score(episodes))
        numbers = learner.gradients(episodes)
        assert all(x.is_cuda for x in numbers.values())
        assert numbers["loss"].item() == pytest.approx(loss, rel=1e-5)
        work.assert_close({n: p.grad.inner for n, p in there.named_parameters()}, want)


def test_generation(work):
    from test_generate import TOKENIZER

    from fastgrpo.trainer import generate

    model = work.make_model()
    sampler, sampling = generate.TransformersSampler(TOKENIZER), generate.Sampling(max_completion_length=5)
    prompts = [[3, 4, 5], [6]]
    want = sampler.generate(model, prompts, sampling, greedy=True)
    with StandInCuda() as cuda:
        got = sampler.generate(move(model, cuda), prompts, sampling, greedy=True)
    for (a,), (b,) in zip(want, got):
        assert a.ids == b.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_the_fused_head_and_what_stands_around_it(work):
    """Labels, padding, logit options: on the model's device."""
    model = work.make_model()
    ids = torch.randint(0, work.VOCABULARY, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    want = model(ids, labels=labels, fastgrpo=True)
    with StandInCuda() as cuda:
        there = move(model, cuda)
        work.fuse_lm_head(there)
        got = there(cuda.put(ids), labels=cuda.put(labels), fastgrpo=True)
        assert_alike([x.detach() for x in want], [x.detach() for x in got])


def test_checkpointing_with_offload(work):
    """Checkpointed layers, recomputed in the backward, and what they keep in host memory."""
    from fastgrpo.trainer.learner import Learner

    config, model, episodes = GRPOLossConfig(), work.make_model(), work.make_episodes()
    work.set_old(model, episodes, config)
    _, want, _ = work.learner_gradients(model, episodes, config)
    with StandInCuda() as cuda:
        there = move(model, cuda).train()
        there.gradient_checkpointing_enable({"use_reentrant": False})
        Learner(there, ACCELERATOR, config, offload=True).gradients(episodes)
        work.assert_close({n: p.grad.inner for n, p in there.named_parameters()}, want)


class MadeUpCard:
    """torch.cuda's memory: so many GiB, 1 MiB a token of the step, and a cap that steps beyond it meet."""

    def __init__(self, monkeypatch, size):
        self.cap, self.peak, self.size = 1.0, 0, int(size * 2**30)
        for name in ("set_per_process_memory_fraction", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=self.size))

    def set_per_process_memory_fraction(self, fraction):
        assert 0 <= fraction <= 1
        self.cap = fraction

    def empty_cache(self):
        pass

    def reset_peak_memory_stats(self):
        self.peak = 0

    def take(self, tokens):
        self.peak = max(self.peak, tokens * 2**20)
        if tokens * 2**20 > self.cap * self.size:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("tuning", "size"), [("lora", 100), ("full", 100), ("lora", 15.6)])
def test_what_fits_is_measured_under_a_cap(work, monkeypatch, tuning, size):
    """bench's branch for a GPU: a tiny model takes steps; the memory is made up."""
    pytest.importorskip("peft")
    from bench import entries
    from bench.shapes import SHAPES, Shape
    from bench.show import Show
    from bench.suites import Options, fit

    card, asked, taken = MadeUpCard(monkeypatch, size), [], set()
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", "qwen2", 64, 32, 48, 1, 2, 1, 16, True))
    monkeypatch.setattr(fit, "PROMPT", 4)
    plan = fit.Plan("tiny", tuning)
    real = entries.ENTRIES["fastgrpo certified"]

    def run_loss(p):
        asked.append(p)
        assert all(x.is_cuda for x in (p.hidden, p.weight, p.targets, p.advantages, p.mask, p.old, p.ref))
        assert p.targets.is_contiguous()  # as Liger's Triton loss asserts
        assert p.weight.requires_grad == (tuning == "full")
        return real.run_loss(p)

    step = fit.Trainee.step

    def counted(trainee, entry, sequences, completion):  # the memory of the size asked for, the work of a small one
        card.take(sequences * completion)
        small = min(sequences, 2), min(completion, 8)
        if (trainee, small) not in taken:  # which is the same each time
            step(trainee, entry, *small)
        taken.add((trainee, small))

    monkeypatch.setattr(fit.Trainee, "step", counted)
    options = Options("cuda", ["fit"], output=None)
    with StandInCuda(), Show(quiet=True) as show:
        rows = fit.measure_cards(plan, {"ours": SimpleNamespace(run_loss=run_loss)}, show, options)
    assert asked
    assert card.cap == 1.0  # as it was
    for row in rows:
        if row["card"] > size / 0.9:  # what would be measured is this GPU, not that card
            assert row["reason"] == "not run: this GPU has 16 GiB"
            continue
        most = min(1024 * min(row["card"], size), fit.LIMIT[row["question"]])
        assert row["measured"]
        assert 0.9 * most - 1024 <= row["tokens"] <= most + 1024 // 2, row
    assert len(rows) == len(fit.QUESTIONS) * len(fit.CARDS)
    _, ((_, *cells),) = fit.table(rows[: len(fit.CARDS)])
    assert [c == "-" for c in cells] == [c > size / 0.9 for c in fit.CARDS] + [False]
    assert cells[-1] == "measured"


def test_a_cpu_run_beside_a_gpu(monkeypatch):
    """use_cpu decides, not what torch sees; bf16 is for GPUs that have it, not for those that emulate it."""
    pytest.importorskip("accelerate")
    from fastgrpo.trainer import GRPOConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert GRPOConfig().mixed_precision == "no"  # a T4 or V100
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert GRPOConfig().mixed_precision == "bf16"
    assert GRPOConfig(use_cpu=True).mixed_precision == "no"
    for settings in ({"use_liger_kernel": True}, {"optim": "paged_adamw_8bit"}):
        with pytest.raises(ValueError, match="CUDA GPU"):
            GRPOConfig(use_cpu=True, **settings)


def test_a_checkpoint_of_a_gpu_is_read_into_host_memory(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    from fastgrpo.trainer import checkpoint

    seen, load = [], torch.load
    torch.save({"reference": {"w": torch.ones(2)}}, tmp_path / "trainer_0.pt")
    monkeypatch.setattr(torch, "load", lambda *a, **options: (seen.append(options), load(*a, **options))[1])
    accelerator = SimpleNamespace(num_processes=1, process_index=0, load_state=lambda folder: None, print=print)
    assert checkpoint.load(tmp_path, accelerator, {})["reference"]["w"].sum() == 2
    assert torch.device(seen[0]["map_location"]).type == "cpu"


def test_evaluation_forks_the_random_numbers_of_its_own_gpu(monkeypatch):
    """torch's default touches every GPU of the machine, from every rank."""
    pytest.importorskip("accelerate")
    from fastgrpo.trainer.loop import GRPOTrainer

    def forked(devices=None, **_):
        seen.append(devices)
        return nullcontext()

    seen = []
    monkeypatch.setattr(torch.random, "fork_rng", forked)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for kind, devices in (("cuda", [3]), ("cpu", [])):
        trainer = SimpleNamespace(
            config=SimpleNamespace(num_generations_eval=2, seed=0, eval_pass_threshold=1.0), eval_rows=[1],
            accelerator=SimpleNamespace(device=torch.device(kind), process_index=0, num_processes=1),
            sampler=SimpleNamespace(sync=lambda model: None), model=None, pulse=SimpleNamespace(stage=""),
            answer=lambda rows, n, greedy=False: torch.ones(n),
            meter=SimpleNamespace(columns=lambda answers: {"reward": answers}),
        )  # fmt: skip
        assert GRPOTrainer.evaluate(trainer)["eval/pass@2"] == 1
        assert seen.pop() == devices


def test_liger_s_layers_in_an_adapter_that_is_trained_further(monkeypatch):
    peft, monkey = pytest.importorskip("peft"), pytest.importorskip("liger_kernel.transformers.monkey_patch")
    pytest.importorskip("accelerate")
    from test_learner import make_model
    from transformers.models.qwen2 import modeling_qwen2

    from fastgrpo.trainer import GRPOConfig
    from fastgrpo.trainer import model as models

    for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP"):  # Liger replaces them for good
        monkeypatch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config = GRPOConfig(use_liger_kernel=True, use_peft=True, gradient_checkpointing=False)
    model = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    models.make_trainable(model, config)
    layer = model.get_base_model().model.layers[0]
    assert layer.input_layernorm.forward.__func__ is monkey.LigerRMSNorm.forward
    assert layer.mlp.forward.__func__ is monkey.LigerSwiGLUMLP.forward
