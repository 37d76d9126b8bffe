"""The cold start (§3.2): supervised training on two formats at once, so that RL begins with a policy that can reflect.

    python coldstart.py config/coldstart_toy.py                       # from nothing on one CPU thread, minutes
    python coldstart.py --init_from=Qwen/Qwen3-8B --problems=data/deepscaler.jsonl --from_rollouts=True   # the paper's
    python coldstart.py --init_from=out/small --problems=solved.jsonl --out_dir=out/taught   # see solution_rows

SFT format: question -> trajectory. IFT format: synthesis prompt -> analysis + reconstruction. One masked cross-entropy
over both. The examples come from toy.py (drawn anew at every step), from the policy's own rollouts (rejection sampling,
cached in out_dir/examples.jsonl, so that an interrupted phase goes on), or from solutions that somebody wrote.
The result is out_dir/final, a Hugging Face folder.
Deliberately missing: examples packed into one row.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import failing
import jsonl
import parallel
import reflect
import toy
from checkpoint import Saver, find_start, keep_log, load_optimizer, weights_mark
from configurator import above, at_least, between, configure, one_of, print_config, save_config
from data import (
    BOXED_INSTRUCTION,
    Problem,
    check_prompts_fit,
    encode_prompts,
    file_mark,
    load_problems,
    load_tokenizer,
    problems_for_step,
    render_prompt,
    save_problems,
    stop_ids_of,
)
from metrics import means, open_log
from model import CausalLM, ModelConfig, load_hf, num_params
from parallel import balance, gather, reduce_sums, unsharded
from plan import coldstart_table
from rollout import PAIRING, PREFIX, REFLECTION, Completion, Rollout, completion_text, generate
from train import learning_rate_at, optimizer_step, sample_rollouts, score

# --- what is learned -------------------------------------------------------------------------------------------------
init_from = ""                                  # Hugging Face folder or hub id; 'scratch' = a new small Qwen3 for a toy world
world: one_of("", *toy.WORLDS) = ""             # examples from toy.py; '' = from `problems`
levels: tuple = ()                              # of the world's difficulty levels, () = all
kinds: tuple = ()  # of its examples (toy.SHARES), () = all; ("direct", "give_up") never reflects, nor synthesises
problems = ""                                   # jsonl of {"uid", "question", "answer"[, "solution"]}
from_rollouts = False                           # build the examples from the policy's own right and wrong rollouts on `problems`
synthesis: one_of("policy", "rule") = "policy"  # policy: it writes about its pairs (§3.2); rule: for one too small for that
eval_problems = ""                              # held-out jsonl; a toy world has its own
instruction = BOXED_INSTRUCTION                 # appended to every question, as in RL; '' for the toy worlds
out_dir = "out/coldstart"
resume = False
seed: at_least(0) = 0
# --- the set (from_rollouts) -----------------------------------------------------------------------------------------
n_sft: at_least(0) = 30000                      # question -> trajectory
n_ift: at_least(0) = 15000                      # synthesis prompt -> analysis + reconstruction
queries_per_round: at_least(1) = 64             # sampled between two writes to examples.jsonl
samples_per_prompt: at_least(1) = 8
template: one_of(*reflect.TEMPLATES) = "long"   # synthesis prompt (reflect.TEMPLATES)
max_synthesis_tokens: at_least(0) = 0           # cap of an IFT answer; 0 = 2 * max_new_tokens
train_prefix = False                            # True also trains the preserved wrong reasoning of y_ref: it teaches mistakes
# --- sampling, here and in the evaluation ----------------------------------------------------------------------------
max_new_tokens: at_least(1) = 8192
temperature: above(0) = 1.0
max_rows: at_least(0) = 256                     # rows that decode at once; 0: as many as free memory holds
# --- the optimiser ---------------------------------------------------------------------------------------------------
epochs: at_least(1) = 3                         # over a fixed set; sets max_steps
max_steps: at_least(0) = 0                      # of a toy world, whose examples never repeat
batch_size: at_least(1) = 32                    # examples a step
learning_rate: at_least(0) = 5e-6
warmup_steps: at_least(0) = 50
min_lr: between(0, 1) = 0.0                     # the cosine's floor, as a share of learning_rate
weight_decay: at_least(0) = 0.0
beta1: between(0, 0.9999) = 0.9
beta2: between(0, 0.9999) = 0.999
grad_clip: above(0) = 1.0
tokens_per_microbatch: at_least(1) = 16384      # padded tokens of one forward / backward: the memory knob
checkpoint_activations = False                  # recompute every block in the backward pass
# --- evaluation, stopping, saving, machine ---------------------------------------------------------------------------
plan = False                                    # print the memory it will need, from config.json alone, and stop
plan_gpus: at_least(0) = 0                      # ... on so many GPUs; 0 = what is here
plan_gpu_gb: at_least(0) = 0.0                  # ... of so much memory
eval_interval: at_least(0) = 200                # steps; 0 = only at the end
eval_samples: at_least(1) = 4                   # per held-out problem
n_eval: at_least(1) = 150                       # held-out problems of a toy world
stop_at_pass1: between(0, 1) = 0.0              # end at this held-out Pass@1: RL needs room to improve; 0 = run to the end
problems_dir = "data"                           # a toy world writes {world}_{split}.jsonl here, for train.py and eval.py ...
n_problems = (8000, 500, 1000)                  # ... so many of train, validation, test
save_interval: at_least(0) = 200
keep_last: at_least(1) = 1
max_bad_steps: at_least(1) = 3                  # in a row: loss or gradient not finite, update skipped; then the run stops
log_to: one_of("", "wandb", "tensorboard") = ""  # see train.py
device: one_of("auto", "cpu", "cuda") = "auto"
dtype: one_of("float32", "bfloat16") = "float32"  # of products; weights and AdamW moments stay fp32 either way
threads: at_least(0) = 0                        # CPU threads; 0 = torch's choice
replicas: at_least(1) = 1                       # several processes: see train.py
offload = False
timeout_minutes: above(0) = 60.0
# --- the new model of init_from = 'scratch' --------------------------------------------------------------------------
hidden_size = 64
intermediate_size = 160
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
context: at_least(1) = 1024
init_std: above(0) = 0.08  # of the matrices; the usual 0.02 is meant for widths of 1000 and learns far slower here

EXAMPLE_KNOBS = ("seed", "synthesis", "queries_per_round", "samples_per_prompt", "template", "max_synthesis_tokens",
                 "max_new_tokens", "temperature", "instruction")  # what decides the content of examples.jsonl
EXAMPLES = 10                  # noise stream of the toy examples, apart from rollout.py's


def check_config(c: SimpleNamespace) -> None:
    """Refuse at start what would fail later. One line each: value, rule, fix."""
    if not c.init_from:
        raise ValueError("init_from is not set; pass a Hugging Face folder or hub id, or 'scratch' with a toy world")
    if bool(c.world) == bool(c.problems):
        raise ValueError(f"world = {c.world!r}, problems = {c.problems!r}: set exactly one, the source of examples")
    if set(c.kinds) - set(toy.SHARES.get(c.world, ())):
        raise ValueError(f"kinds = {c.kinds} of world = {c.world!r}: use some of {', '.join(toy.SHARES.get(c.world, ()))} "
                         "(of a toy world alone)")
    if c.world and c.max_steps < 1:
        raise ValueError(f"max_steps = {c.max_steps}: toy examples have no epochs; set max_steps")
    if c.from_rollouts and not c.problems:
        raise ValueError("from_rollouts = True needs problems to sample on; set problems")
    if c.init_from == "scratch" and not c.world:
        raise ValueError("init_from = 'scratch' knows no language; pass a pretrained model, or set world")
    if c.stop_at_pass1 and not (c.world or c.eval_problems):
        raise ValueError(f"stop_at_pass1 = {c.stop_at_pass1} has nothing to measure; set eval_problems")
    if c.from_rollouts and c.samples_per_prompt < 2:
        raise ValueError(f"samples_per_prompt = {c.samples_per_prompt} leaves no right and wrong pair; use at least 2")


# ----------------------------------------------------------------------------------------------------------------------
# examples as token ids


@dataclass
class Row:
    """One training row; its names are those that rollout.microbatches looks for."""
    prompt_ids: list[int]
    completion_ids: list[int]  # ends with the stop token
    loss_mask: list[float]     # one per completion id


def encode(tokenizer, prompt: str, completion: str, no_loss=(), instruction: str = "") -> Row:
    """Text to ids; a token that touches a no_loss (start, end) character span of the completion carries no loss."""
    return Row(render_prompt(tokenizer, prompt, instruction), *encode_completion(tokenizer, completion, no_loss))


def encode_completion(tokenizer, completion: str, no_loss=()) -> tuple[list[int], list[float]]:
    """Ids and loss mask of a completion, the stop token included."""
    encoded = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
    mask = [float(all(high <= start or low >= end for start, end in no_loss))
            for low, high in encoded["offset_mapping"]]
    return [*encoded["input_ids"], tokenizer.eos_token_id], [*mask, 1.0]


def collate(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """inputs, targets (B, T) int64 and loss mask (B, T) fp32, right-padded and shifted once.

    prompt [5, 6], completion [7, 8, 2] with mask [0, 1, 1]:  inputs 5 6 7 8   targets 6 7 8 2   mask 0 0 1 1
    """
    width = max(len(r.prompt_ids) + len(r.completion_ids) for r in rows) - 1
    inputs, targets = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(len(rows), width)
    for b, r in enumerate(rows):
        ids = torch.tensor(r.prompt_ids + r.completion_ids)
        end = len(ids) - 1
        inputs[b, :end], targets[b, :end] = ids[:-1], ids[1:]
        mask[b, len(r.prompt_ids) - 1:end] = torch.tensor(r.loss_mask)
    return inputs, targets, mask


FILLER = Row([0], [0], [0.0])  # stands in where a process has nothing left to do: counts nowhere


def toy_rows(tokenizer, questions: list[str], c, step: int) -> list[Row]:
    """The batch of one step: a function of (seed, step), so that resuming needs no state."""
    rng = np.random.default_rng((c.seed, EXAMPLES, step))
    drawn = [questions[i] for i in rng.integers(len(questions), size=c.batch_size)]
    shares = {kind: share for kind, share in toy.SHARES[c.world].items() if not c.kinds or kind in c.kinds}
    shares = {kind: share / sum(shares.values()) for kind, share in shares.items()}
    examples = [toy.example(rng, question, shares) for question in drawn]
    return [encode(tokenizer, e.prompt, e.completion, e.no_loss) for e in examples]


def solution_rows(tokenizer, c, context: int) -> list[Row]:
    """Both formats from a problem file: every line has a "solution"; one that also has a "wrong" response and the
    "synthesis" (analysis and reconstruction) that is to be written about the two gives an IFT example as well."""
    training, rows = load_problems(c.problems), []
    for problem, (number, line) in zip(training, jsonl.lines(c.problems), strict=True):
        where = f"{c.problems}:{number}"
        keys = jsonl.parse(line, where)
        solution, wrong, synthesis = (keys.get(key) for key in ("solution", "wrong", "synthesis"))
        if not solution:
            raise ValueError(f"{where}: no \"solution\"; add it, or use --from_rollouts=True")
        if bool(wrong) != bool(synthesis):
            raise ValueError(f"{where}: has one of \"wrong\" and \"synthesis\"; give both or neither")
        rows.append(encode(tokenizer, problem.question, solution, instruction=c.instruction))
        if synthesis:
            asked = reflect.synthesis_prompt(tokenizer, problem, wrong, solution, c.template)
            rows.append(Row(asked, *encode_completion(tokenizer, synthesis)))
        longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows[-2:])
        if longest > context:
            raise ValueError(f"{where}: an example of {longest} tokens does not fit the model's context of {context}; shorten "
                             "or remove it")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# the paper's examples: the policy's own mistakes


def construct(model, tokenizer, rollouts, problem_of, stop_ids, c, number: int) -> list[dict]:
    """One (wrong, right) pair per query where there is one, its synthesis, and what became of it: [result].

    The policy writes the synthesis (§3.2), or with synthesis = 'rule' reflect.rule_synthesis. rollouts are scored
    ones, problem_of {query: Problem}. A result has query, uid, outcome ('kept', 'wrong' or one of
    reflect.DROP_REASONS), the texts `wrong` and `synthesis`, `prefix` if something was built, and if kept the ids of
    both formats.
    """
    if c.synthesis == "rule":
        pairs = reflect.rule_pairs(rollouts)
    else:
        pairs, _ = reflect.select_candidates(rollouts, n_pos=1, n_neg=1, m_max=1, key=(c.seed, PAIRING, number))
    limit = c.max_synthesis_tokens or 2 * c.max_new_tokens
    asked = [reflect.synthesis_prompt(tokenizer, problem_of[wrong.query], wrong.text, right.text, c.template)
             for wrong, right in pairs]
    fits = [len(prompt) + limit <= model.config.max_position_embeddings for prompt in asked]
    pairs, asked = ([x for x, fit in zip(both, fits, strict=True) if fit] for both in (pairs, asked))
    if c.synthesis == "rule":
        texts = [reflect.rule_synthesis(wrong.text, right.text) for wrong, right in pairs]
        written = [[Completion(encode_completion(tokenizer, text)[0], [], finished=True)] for text in texts]
    else:
        written = generate(
            model, asked, 1, max_new_tokens=limit, stop_ids=stop_ids, temperature=c.temperature, max_rows=c.max_rows,
            keys=[(c.seed, REFLECTION, number, wrong.query) for wrong, _ in pairs])
    built = [reflect.build_reflection(tokenizer, wrong, synthesis, prefix_mode="micro", decoupled=True,
                                      stop_id=wrong.completion_ids[-1], max_new_tokens=c.max_new_tokens)
             for (wrong, _), (synthesis,) in zip(pairs, written, strict=True)]
    score([y_ref for y_ref in built if isinstance(y_ref, Rollout)], problem_of)

    results = []
    for (wrong, _), prompt_ids, (synthesis,), y_ref in zip(pairs, asked, written, built, strict=True):
        result = {"query": wrong.query, "uid": wrong.uid, "outcome": y_ref, "wrong": wrong.text,
                  "synthesis": completion_text(tokenizer, synthesis)}
        if isinstance(y_ref, Rollout):
            prefix = y_ref.completion_ids[:y_ref.roles.count(PREFIX)]
            result |= {"outcome": "kept" if y_ref.reward > 0 else "wrong", "prefix": tokenizer.decode(prefix)}
            if y_ref.reward > 0 and synthesis.finished:
                result |= {"prompt_ids": wrong.prompt_ids, "completion_ids": y_ref.completion_ids, "roles": y_ref.roles,
                           "synthesis_prompt_ids": prompt_ids, "synthesis_ids": synthesis.ids}
        results.append(result)
    return results


def rollout_rows(tokenizer, stop_ids, c, device, rank=0, world=1, wrap=None) -> list[Row]:
    """§3.2: visit every query once, at most one example from each, until n_sft + n_ift are found; both formats as rows.

    A round of queries is appended to examples.jsonl as one line, below a header that says how they are made; with resume
    what stands there is not sampled again. All processes go by what the first of them finds in the file.
    """
    path, training = Path(c.out_dir) / "examples.jsonl", load_problems(c.problems)
    rounds = []
    if rank == 0:
        header = {"weights": weights_mark(c.init_from), "problems": file_mark(c.problems)}
        header |= {knob: getattr(c, knob) for knob in EXAMPLE_KNOBS}
        if c.resume:
            rounds = jsonl.read_headed(path, header, "choose another out_dir, or --resume=False to sample anew")
        if not rounds:
            jsonl.write(path, [header])
    rounds = [row["results"] for row in gather(rounds)]
    n_rounds = -(-len(training) // c.queries_per_round)
    quiet = True if rank > 0 else None  # None: shown on a terminal only
    bar, model = tqdm(total=n_rounds, initial=len(rounds), desc="examples", unit=" rounds", disable=quiet), None
    usable = [result for results in rounds for result in results if "completion_ids" in result]
    while len(rounds) < n_rounds and len(usable) < c.n_sft + c.n_ift:
        if model is None:
            model = load_hf(c.init_from, device=device, num_tokens=len(tokenizer), wrap=wrap)
        number = len(rounds)
        queries = problems_for_step(training, c.seed, number, c.queries_per_round)
        queries = [(query, p) for query, p in queries if query < len(training)][rank::world]  # one epoch, no more
        encode_prompts(tokenizer, [p for _, p in queries], c.instruction)
        check_prompts_fit([p for _, p in queries], c.max_new_tokens, model.config.max_position_embeddings)
        with failing.out_of_memory_names(c, "max_rows"), unsharded(model) as sampler:
            rollouts = sample_rollouts(sampler, tokenizer, queries, stop_ids, c, number)
            score(rollouts, dict(queries))
            results = construct(sampler, tokenizer, rollouts, dict(queries), stop_ids, c, number)
        rounds.append(sorted(gather(results), key=lambda result: result["query"]))
        if rank == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"results": rounds[-1]}, ensure_ascii=False) + "\n")
        usable += [result for result in rounds[-1] if "completion_ids" in result]
        bar.update()
        bar.set_postfix_str(f"{len(usable)} examples", refresh=False)
    bar.close()
    if not usable:
        outcomes = sorted({result["outcome"] for results in rounds for result in results})
        raise ValueError(f"this run cannot learn: {len(training)} problems gave no example (what came of their pairs: "
                         f"{', '.join(outcomes) or 'none'}); start from a model that solves some of them, or raise "
                         "samples_per_prompt")
    # distinct trajectories while there are enough of them, else some are seen in both formats
    sft, ift = usable[:c.n_sft], usable[max(0, len(usable) - c.n_ift):]
    if rank == 0:
        print(f"{len(training):,} problems -> {len(usable):,} trajectories -> {len(sft):,} SFT + {len(ift):,} IFT examples")
    return [Row(r["prompt_ids"], r["completion_ids"], [float(c.train_prefix or role != PREFIX) for role in r["roles"]])
            for r in sft] + [
            Row(r["synthesis_prompt_ids"], r["synthesis_ids"], [1.0] * len(r["synthesis_ids"])) for r in ift]


# ----------------------------------------------------------------------------------------------------------------------
# the measurements that decide whether RL can start from here


def measure(model, tokenizer, held_out: list[Problem], stop_ids, c, rank=0, world=1) -> dict[str, float]:
    """eval/*: held-out Pass@1, and in a toy world what its exact truth allows to say of the model's own mistakes.

    reflects_after_error: of the responses with an error, the share that looks again right behind it. Of the syntheses
    for the model's own wrong responses, the shares that are parsed and that give a trajectory (constructed); of these,
    the shares that end right and that are localised (keep exactly what stands before the end of the first error).
    """
    queries = list(enumerate(held_out))[rank::world]
    several = SimpleNamespace(**vars(c) | {"samples_per_prompt": c.eval_samples})
    rollouts = sample_rollouts(model, tokenizer, queries, stop_ids, several, 0)
    score(rollouts, dict(queries))
    counts = {"pass1": [r.reward for r in rollouts], "truncated": [not r.finished for r in rollouts]}
    if c.world:
        errors = [toy.first_error(held_out[r.query].question, r.text) for r in rollouts]
        results = construct(model, tokenizer, rollouts, dict(queries), stop_ids, c, 0)
        built = [r for r in results if r["outcome"] in ("kept", "wrong")]
        counts |= {
            "reflects_after_error": [r.text[end:].startswith("Wait, ")
                                     for r, end in zip(rollouts, errors, strict=True) if end],
            "parsed": [r["outcome"] not in ("unfinished", "unparsable") for r in results],
            "constructed": [r in built for r in results],
            "right": [r["outcome"] == "kept" for r in built],
            "localised": [len(r["prefix"]) == toy.first_error(held_out[r["query"]].question, r["wrong"])
                          for r in built]}
    sums = {f"eval/{name}": sum(values) for name, values in counts.items()}
    return means(reduce_sums(sums | {f"eval/{name}#": len(values) for name, values in counts.items()}))


# ----------------------------------------------------------------------------------------------------------------------


def start_model(c, load_from: str, device: str, wrap=None):
    """Tokenizer and model to go on with: a folder's, or for 'scratch' the toy tokenizer and a new Qwen3."""
    if load_from != "scratch":
        tokenizer = load_tokenizer(load_from)
        return tokenizer, load_hf(load_from, device=device, num_tokens=len(tokenizer), wrap=wrap)
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(c.seed)
    model = CausalLM(ModelConfig(
        vocab_size=len(tokenizer), hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, head_dim=c.head_dim,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.context, rope_theta=10000.0,
        eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(c.init_std / 0.02)  # model.py initialises for widths of 1000
    model = model.to(device)
    return tokenizer, wrap(model) if wrap else model


def update(model, optimizer, rows: list[Row], c, device, autocast, rank=0, world=1) -> dict[str, float]:
    """One step of masked cross-entropy: -sum(logprobs * mask) / sum(mask) over the whole batch of all processes."""
    # CRITICAL: one denominator, counted before the first backward; a mean per micro-batch would weigh short rows more
    total = max(1.0, sum(sum(r.loss_mask) for r in rows))
    loss = torch.zeros((), device=device)
    for index in balance(rows, c.tokens_per_microbatch, rank, world):
        inputs, targets, mask = collate([[*rows, FILLER][i] for i in index])
        first = int(mask.any(0).int().argmax())  # the columns before it carry no loss: no need of the head, whose cost is V
        inputs, targets, mask = inputs.to(device), targets[:, first:].to(device), mask[:, first:].to(device)
        with autocast:
            logprobs, _ = model(inputs, targets)
        part = -torch.where(mask > 0, logprobs, 0.0).sum() / total
        (part * world).backward()  # FSDP averages gradients over processes
        loss += part.detach()
    return optimizer_step(model, optimizer, {"train/loss": loss}, c.grad_clip) | {"train/trained_tokens": total}


def write_problem_files(c, folder: Path) -> None:
    """The toy world's splits as problem files, for train.py and eval.py."""
    for split, n in zip(toy.SPLITS, c.n_problems, strict=True):
        save_problems(toy.make_problems(c.world, split, n, levels=c.levels or None), folder / f"{c.world}_{split}.jsonl")


def main() -> None:
    """Examples, then masked cross-entropy on them until the epochs, the steps or stop_at_pass1 end it; out_dir/final."""
    config = configure(globals())
    c = SimpleNamespace(**config)
    check_config(c)
    parallel.check_world(c.replicas)
    if c.plan:
        print(coldstart_table(config))
        return
    config["problems_mark"] = file_mark(c.problems)  # a resumed run must find the problems it began with
    out = Path(c.out_dir)
    if c.resume and (out / "final" / "meta.json").is_file():
        print(f"{out / 'final'} is finished; nothing to resume")
        return
    first_step, load_from = find_start(config)
    rank, world, device = parallel.start(c.device, c.timeout_minutes)
    parallel.check_shared(c.out_dir, first_step)
    say = print if rank == 0 else lambda *_, **__: None
    if c.threads:
        torch.set_num_threads(c.threads)
    wrap, autocast = parallel.precision(c, world, device)
    if rank == 0:
        print_config(config)
        save_config(config, out)
        log_also = open_log(c.log_to, config, first_step)

    tokenizer, model = start_model(c, load_from, device, wrap)
    model.checkpoint_activations = c.checkpoint_activations
    stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
    if c.world:
        if rank == 0:
            write_problem_files(c, Path(c.problems_dir))
        questions = [p.question for p in toy.make_problems(c.world, "train", c.n_problems[0], levels=c.levels or None)]
        held_out = toy.make_problems(c.world, "validation", c.n_eval, levels=c.levels or None)
        max_steps = c.max_steps
    else:
        with autocast:
            rows = (rollout_rows(tokenizer, stop_ids, c, device, rank, world, wrap) if c.from_rollouts
                    else solution_rows(tokenizer, c, model.config.max_position_embeddings))
        held_out = load_problems(c.eval_problems) if c.eval_problems else []
        max_steps = c.max_steps or -(-c.epochs * len(rows) // c.batch_size)
        say(f"{len(rows):,} examples, {max_steps:,} steps")
    encode_prompts(tokenizer, held_out, c.instruction)
    check_prompts_fit(held_out, c.max_new_tokens, model.config.max_position_embeddings)
    schedule = SimpleNamespace(**vars(c) | {"max_steps": max_steps})
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2),
                                  weight_decay=c.weight_decay, fused=True)
    if first_step:
        load_optimizer(Path(load_from), model, optimizer)
    if rank == 0:
        keep_log(out / "metrics.jsonl", first_step)
    say(f"{num_params(model):,} parameters on {world} x {device}, stop ids {stop_ids}", flush=True)

    quiet = True if rank > 0 else None  # None: shown on a terminal only
    bar = tqdm(total=max_steps, initial=first_step, desc="cold start", unit=" steps", disable=quiet)
    saver, stop = Saver(tokenizer, config), failing.Stop()
    started, done, stopped_by, bad_steps = time.perf_counter(), first_step, 0, 0
    for step in range(first_step, max_steps):
        batch = toy_rows(tokenizer, questions, c, step) if c.world else [
            row for _, row in problems_for_step(rows, c.seed, step, c.batch_size)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, schedule)
        with failing.out_of_memory_names(c, "tokens_per_microbatch", "checkpoint_activations", "offload"):
            metrics = update(model, optimizer, batch, c, device, autocast, rank, world)
        metrics["train/lr"] = learning_rate_at(step, schedule)
        done = step + 1
        bar.update()
        good_enough = False
        if held_out and (done == max_steps or (c.eval_interval and done % c.eval_interval == 0)):
            with failing.out_of_memory_names(c, "max_rows"), unsharded(model) as sampler, autocast:
                metrics |= measure(sampler, tokenizer, held_out, stop_ids, c, rank, world)
            good_enough = 0 < c.stop_at_pass1 <= metrics["eval/pass1"]
            shown = " | ".join(f"{key[5:]} {value:.3f}" for key, value in metrics.items() if key.startswith("eval/"))
            if rank == 0:
                bar.write(f"step {done:5d}/{max_steps} | loss {metrics['train/loss']:.3f} | {shown} | "
                          f"{time.perf_counter() - started:.0f} s")
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as log:
                elapsed = {"time/elapsed": time.perf_counter() - started}
                log.write(json.dumps({"step": done} | metrics | elapsed) + "\n")
            log_also(done, metrics | elapsed)
        bad_steps = bad_steps + 1 if metrics["train/skipped"] else 0
        failing.check_bad_steps(bad_steps, c)
        if good_enough:
            break
        stopped_by = max(gather([stop.signal])) if done < max_steps else 0
        if stopped_by or (done < max_steps and c.save_interval and done % c.save_interval == 0):
            saver.save(out / f"step_{done:06d}", model, optimizer, done)
        if stopped_by:
            break
    bar.close()
    if stopped_by:
        failing.end_after_signal(stopped_by, done, max_steps, out, say)
    saver.save(out / "final", model, optimizer, done)
    say(f"saved {out / 'final'} after {done} steps")


if __name__ == "__main__":
    failing.run(main)
