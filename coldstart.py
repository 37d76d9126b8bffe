"""The cold start (§3.2): supervised training on two formats, so that RL can begin.

    python toy.py findx --levels=1 && python coldstart.py config/coldstart_toy.py  # minutes
    python coldstart.py --init_from=Qwen/Qwen3-8B --problems=data/deepscaler.jsonl   # the paper's
    python coldstart.py --init_from=out/small --examples=solved.jsonl    # worked examples

SFT format: question -> trajectory. IFT format: synthesis prompt -> analysis + reconstruction. One
masked cross-entropy over both. The examples are read from a file (`examples`), or built from the
policy's own rollouts on `problems` (rejection sampling, stored in out_dir/examples.jsonl, so that
an interrupted run can resume). The result is out_dir/final, a Hugging Face folder.

Deliberately missing: packing several examples into one row.
"""
import functools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import failing
import jsonl
import parallel
import reflect
from advantage import nll_loss
from checkpoint import Saver, find_start, keep_log, load_optimizer, weights_mark
from configurator import above, at_least, between, configure, one_of, print_config, save_config
from data import (
    BOXED_INSTRUCTION,
    check_prompts_fit,
    encode_prompts,
    file_mark,
    load_problems,
    load_tokenizer,
    problems_for_step,
    render_prompt,
    stop_ids_of,
)
from hf import load_hf
from metrics import evaluate, means, open_log
from model import num_params
from parallel import Unsharded, gather, rank, say, world_size
from reward import score
from rollout import PAIRING, PREFIX, REFLECTION, ROLLOUT, Decoder, Rollout, sample_rollouts
from update import largest_microbatch, set_learning_rate, set_loss_scales, update

# --- what is learned ------------------------------------------------------------------------------
init_from = ""              # Hugging Face folder or hub id
examples = ""               # jsonl of worked examples, see read_examples
problems = ""               # instead of `examples`: jsonl of problems for the policy's rollouts
synthesis: one_of("policy", "rule") = "policy"  # rule: for a policy too small to write syntheses
eval_problems = ""          # held-out jsonl
instruction = BOXED_INSTRUCTION  # appended to every question, as in RL
out_dir = "out/coldstart"
resume = False
seed: at_least(0) = 0
# --- examples from `problems` ---------------------------------------------------------------------
n_sft: at_least(0) = 30000              # question -> trajectory
n_ift: at_least(0) = 15000              # synthesis prompt -> analysis + reconstruction
queries_per_round: at_least(1) = 64     # queries sampled per write to examples.jsonl
samples_per_prompt: at_least(2) = 8
template: one_of(*reflect.TEMPLATES) = "long"  # synthesis prompt
max_synthesis_tokens: at_least(0) = 0   # cap of a synthesis; 0 = 2 * max_new_tokens
train_prefix = False                    # True also trains the preserved prefix (mistakes) of y_ref
# --- sampling, here and in the evaluation ---------------------------------------------------------
max_new_tokens: at_least(1) = 8192
temperature: above(0) = 1.0
max_rows: at_least(0) = 256             # rows that decode at once; 0: as many as free memory holds
# --- the optimiser (AdamW) ------------------------------------------------------------------------
epochs: at_least(1) = 3
batch_size: at_least(1) = 32            # examples a step
learning_rate: at_least(0) = 5e-6       # cosine to 0 after warm-up
warmup_steps: at_least(0) = 50
weight_decay: at_least(0) = 0.0
beta2: between(0, 0.9999) = 0.999
grad_clip: above(0) = 1.0
tokens_per_microbatch: at_least(0) = 0  # padded tokens of a forward / backward; 0: as many as fit
checkpoint_activations = False          # recompute blocks in the backward pass
# --- evaluation, saving, machine ------------------------------------------------------------------
eval_interval: at_least(0) = 200        # steps; 0 = only at the end
eval_samples: at_least(1) = 4           # per held-out problem
stop_at_pass1: between(0, 1) = 0.0      # stop at this held-out Pass@1: RL needs room; 0 = never
save_interval: at_least(0) = 200
keep_last: at_least(1) = 1
log_to: one_of("", "wandb", "tensorboard") = ""
device: one_of("auto", "cpu", "cuda") = "auto"
dtype: one_of("float32", "bfloat16") = "float32"  # to compute in; weights and moments stay fp32
threads: at_least(0) = 0                # CPU threads; 0 = torch's choice
replicas: at_least(1) = 1               # see train.py
offload = False
timeout_minutes: above(0) = 60.0

# knobs that determine the content of out_dir/examples.jsonl
EXAMPLE_KNOBS = ("seed", "synthesis", "queries_per_round", "samples_per_prompt", "template",
                 "max_synthesis_tokens", "max_new_tokens", "temperature", "instruction")


def check_config(c: SimpleNamespace) -> None:
    """Refuse at start settings that would fail later; messages give value, rule and fix."""
    if not c.init_from:
        raise ValueError("init_from is not set; pass --init_from=MODEL, a folder or hub id")
    if bool(c.examples) == bool(c.problems):
        raise ValueError(f"examples = {c.examples!r}, problems = {c.problems!r}: set exactly one, "
                         "worked examples or problems to sample on")
    for path in filter(None, (c.examples, c.problems, c.eval_problems)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file at {path}; `python toy.py findx` and "
                                    "`python -m tools.prepare` make some")
    if c.stop_at_pass1 and not c.eval_problems:
        raise ValueError(f"stop_at_pass1 = {c.stop_at_pass1} has nothing to measure; set "
                         "eval_problems")


# --------------------------------------------------------------------------------------------------
# worked examples


def read_examples(path: str, tokenizer, instruction: str, context: int) -> list[Rollout]:
    """Rows of a jsonl file, one example a line, as Rollouts to imitate.

    {"prompt": the whole user turn, "completion": text[, "no_loss": [[start, end], ..]]}; no_loss:
    character spans of the completion without loss, such as planted mistakes. Alternatively
    {"question", "solution"}: the prompt is the question + `instruction`. ValueError, with the line,
    for other keys and for an example longer than the model's context.
    """
    rows = []
    for number, line in jsonl.lines(path):
        where = f"{path}:{number}"
        keys = jsonl.parse(line, where)
        if keys.get("prompt") and keys.get("completion"):
            prompt, text = keys["prompt"], keys["completion"]
        elif keys.get("question") and keys.get("solution"):
            prompt, text = keys["question"] + instruction, keys["solution"]
        else:
            raise ValueError(f"{where}: no \"prompt\" with \"completion\", nor \"question\" with "
                             "\"solution\"; to sample solutions use --problems")
        r = written(tokenizer, render_prompt(tokenizer, prompt, ""), text, keys.get("no_loss", ()))
        if len(r) > context:
            raise ValueError(f"{where}: an example of {len(r)} tokens does not fit the model's "
                             f"context of {context}; shorten or remove it")
        rows.append(r)
    if not rows:
        raise ValueError(f"{path} holds no examples")
    return rows


def written(tokenizer, prompt_ids: list[int], text: str, no_loss=()) -> Rollout:
    """A given completion as a Rollout: mask 0 where a token overlaps a no_loss span."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [float(all(high <= start or low >= end for start, end in no_loss))
            for low, high in encoded["offset_mapping"]]
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    return imitated(prompt_ids, ids, [*mask, 1.0])


def imitated(prompt_ids: list[int], ids: list[int], mask: list[float]) -> Rollout:
    return Rollout(None, "", prompt_ids, ids, [PREFIX] * len(ids), True, "", mask=mask)


# --------------------------------------------------------------------------------------------------
# the paper's examples: the policy's own mistakes


def construct_round(model, tokenizer, queries: list, number: int, *, synthesis: str, seed: int,
                    samples_per_prompt: int, template: str, max_synthesis_tokens: int,
                    **sampling) -> list[dict]:
    """At most one trajectory per query -> one result per query with a (wrong, right) pair.

    A result has query, uid, outcome ('kept', 'wrong' or one of reflect.DROP_REASONS), the texts
    `wrong` and `synthesis`, and, if kept and finished, both formats' ids. number: of the round.
    """
    rollouts = sample_rollouts(model, tokenizer, queries, samples_per_prompt,
                               key=(seed, ROLLOUT, number), **sampling)
    score(rollouts)
    by_rule = synthesis == "rule"
    if by_rule:
        pairs = reflect.rule_pairs(rollouts)
    else:
        pairs, _ = reflect.select_pairs(rollouts, n_pos=1, n_neg=1, m_max=1,
                                        key=(seed, PAIRING, number))
    constructions = reflect.construct(
        model, tokenizer, pairs, prefix_mode="micro", template=template, decoupled=True,
        by_rule=by_rule, max_synthesis_tokens=max_synthesis_tokens, key=(seed, REFLECTION, number),
        **sampling)
    score([x.outcome for x in constructions if isinstance(x.outcome, Rollout)])
    results = []
    for x in constructions:
        y_ref = x.outcome
        result = {"query": x.wrong.query, "uid": x.wrong.problem.uid, "outcome": y_ref,
                  "wrong": x.wrong.text}
        if x.synthesis:
            result["synthesis"] = tokenizer.decode(x.synthesis.ids)
        if isinstance(y_ref, Rollout):
            result["outcome"] = "kept" if y_ref.reward > 0 else "wrong"
            if y_ref.reward > 0 and x.synthesis.finished:
                result |= {"prompt_ids": y_ref.prompt_ids, "completion_ids": y_ref.completion_ids,
                           "roles": y_ref.roles, "synthesis_prompt_ids": x.prompt_ids,
                           "synthesis_ids": x.synthesis.ids}
        results.append(result)
    return results


def sample_examples(unsharded: Unsharded | None, tokenizer, training: list, *, path: Path,
                    header: dict, resume: bool, wanted: int, queries_per_round: int, max_rows: int,
                    instruction: str, **how) -> list[dict]:
    """§3.2: visit every query once, at most one example from each, until `wanted` examples exist.

    -> results of construct_round that have both formats. Each round of queries is appended to
    `path` as one line, below a header with the settings; with resume, rounds in the file are not
    sampled again. Rank 0 reads the file for all ranks. unsharded: None once the policy is trained
    (ValueError if examples are missing then). how: see construct_round.
    """
    rounds = []
    if rank() == 0:
        rounds = jsonl.begin_or_resume(path, header, "choose another out_dir, or --resume=False "
                                       "to sample anew", resume=resume)
    rounds = [row["results"] for row in gather(rounds)]
    n_rounds = -(-len(training) // queries_per_round)
    bar = tqdm(total=n_rounds, initial=len(rounds), desc="examples", unit=" rounds",
               disable=True if rank() else None)  # None: shown on a terminal only
    usable = [result for results in rounds for result in results if "completion_ids" in result]
    decoder = Decoder()
    while len(rounds) < n_rounds and len(usable) < wanted:
        if unsharded is None:
            raise ValueError(f"{path} holds {len(usable)} examples, but the checkpoint is of a run "
                             "that had more; put the file back, or choose another out_dir")
        number = len(rounds)
        queries = problems_for_step(training, how["seed"], number, queries_per_round)
        queries = [(query, p) for query, p in queries if query < len(training)]  # one epoch
        queries = queries[rank()::world_size()]
        encode_prompts(tokenizer, [p for _, p in queries], instruction)
        check_prompts_fit([p for _, p in queries], how["max_new_tokens"],
                          unsharded.model.config.max_position_embeddings)
        with failing.out_of_memory_names(path.parent, max_rows=max_rows), unsharded as sampler:
            results = construct_round(sampler, tokenizer, queries, number, max_rows=max_rows,
                                      decoder=decoder, **how)
        rounds.append(sorted(gather(results), key=lambda result: result["query"]))
        if rank() == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"results": rounds[-1]}, ensure_ascii=False) + "\n")
        usable += [result for result in rounds[-1] if "completion_ids" in result]
        bar.update()
        bar.set_postfix_str(f"{len(usable)} examples", refresh=False)
    bar.close()
    if not usable:
        outcomes = sorted({result["outcome"] for results in rounds for result in results})
        raise ValueError(f"this run cannot learn: {len(training)} problems gave no example (what "
                         f"came of their pairs: {', '.join(outcomes) or 'none'}); start from a "
                         "model that solves some of them, or raise samples_per_prompt")
    return usable


def both_formats(usable: list[dict], *, n_sft: int, n_ift: int,
                 train_prefix: bool) -> list[Rollout]:
    """Rows to imitate: SFT from the front of `usable`, IFT from its end; overlapping if too few."""
    sft, ift = usable[:n_sft], usable[max(0, len(usable) - n_ift):]
    say(f"{len(usable):,} trajectories -> {len(sft):,} SFT + {len(ift):,} IFT examples")
    rows = []
    for x in sft:
        mask, _ = reflect.token_masks(x["roles"], diagnosis="train", train_prefix=train_prefix)
        rows.append(imitated(x["prompt_ids"], x["completion_ids"], mask))
    for x in ift:
        rows.append(imitated(x["synthesis_prompt_ids"], x["synthesis_ids"],
                             [1.0] * len(x["synthesis_ids"])))
    return rows


# --------------------------------------------------------------------------------------------------


def imitate(model, optimizer, rows: list[Rollout], **knobs) -> dict[str, float]:
    """One step of masked cross-entropy, -sum(logprobs * mask) / sum(mask) over all rows."""
    # CRITICAL: one denominator per step: a mean per micro-batch would give short rows more weight
    set_loss_scales(rows, lam=1.0, loss_agg="token", loss_norm="merged")

    def loss_fn(batch):
        logprobs, _ = model(batch.inputs, batch.targets)
        return nll_loss(logprobs, batch.mask, batch.loss_scale), {
            "train/trained_tokens": batch.mask.sum()}

    return means(update(model, optimizer, rows, loss_fn, **knobs))


def main() -> None:
    """Build or read the examples, then train on them until `epochs` or stop_at_pass1 is reached."""
    config = configure(globals())
    c = SimpleNamespace(**config)
    check_config(c)
    parallel.check_world(c.replicas)
    config["problems_mark"] = file_mark(c.problems or c.examples)  # must not change on resume
    out = Path(c.out_dir)
    if c.resume and (out / "final" / "meta.json").is_file():
        print(f"{out / 'final'} is finished; nothing to resume")
        return
    first_step, load_from = find_start(config)
    device = parallel.start(c.device, c.timeout_minutes)
    parallel.check_shared(c.out_dir, first_step)
    if c.threads:
        torch.set_num_threads(c.threads)
    wrap = functools.partial(parallel.shard, device=device, dtype=c.dtype, replicas=c.replicas,
                             offload=c.offload)
    if rank() == 0:
        print_config(config, out)
        save_config(config, out)
        log_also = open_log(c.log_to, config, first_step)

    tokenizer = load_tokenizer(load_from)
    model = load_hf(load_from, device=device, num_tokens=len(tokenizer), wrap=wrap)
    model.checkpoint_activations = c.checkpoint_activations
    samples = c.eval_problems or (c.problems and not first_step)
    unsharded = Unsharded(model, dtype=c.dtype, device=device) if samples else None
    context, stop_ids = model.config.max_position_embeddings, stop_ids_of(
        tokenizer, model.config.eos_token_id)
    if c.problems:
        how = {knob: config[knob] for knob in EXAMPLE_KNOBS}
        marks = {"weights": weights_mark(c.init_from), "problems": config["problems_mark"]}
        usable = sample_examples(
            None if first_step else unsharded, tokenizer, load_problems(c.problems),
            path=out / "examples.jsonl", header=marks | how, resume=c.resume,
            wanted=c.n_sft + c.n_ift, max_rows=c.max_rows, stop_ids=stop_ids, **how)
        rows = both_formats(usable, n_sft=c.n_sft, n_ift=c.n_ift, train_prefix=c.train_prefix)
    else:
        rows = read_examples(c.examples, tokenizer, c.instruction, context)
    max_steps = -(-c.epochs * len(rows) // c.batch_size)
    say(f"{len(rows):,} examples, {max_steps:,} steps")
    held_out = load_problems(c.eval_problems) if c.eval_problems else []
    encode_prompts(tokenizer, held_out, c.instruction)
    check_prompts_fit(held_out, c.max_new_tokens, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(0.9, c.beta2),
                                  weight_decay=c.weight_decay, fused=True)
    if first_step:
        load_optimizer(Path(load_from), model, optimizer)
    if rank() == 0:
        keep_log(out / "metrics.jsonl", first_step)
    tokens_per_microbatch = c.tokens_per_microbatch or largest_microbatch(
        model, optimizer, device=device, dtype=c.dtype, reference_model=False)
    say(f"{num_params(model):,} parameters on {world_size()} x {device}, micro-batches of "
        f"{tokens_per_microbatch:,} tokens, stop ids {stop_ids}")

    no_memory = functools.partial(failing.out_of_memory_names, c.out_dir)
    bar = tqdm(total=max_steps, initial=first_step, desc="cold start", unit=" steps",
               disable=True if rank() else None)
    saver, stop = Saver(tokenizer, config), failing.Stop()
    started, done, stopped_by, bad_steps = time.perf_counter(), first_step, 0, 0
    for step in range(first_step, max_steps):
        batch = [row for _, row in problems_for_step(rows, c.seed, step, c.batch_size)]
        rate = set_learning_rate(optimizer, step, learning_rate=c.learning_rate,
                                 warmup_steps=c.warmup_steps, max_steps=max_steps)
        with no_memory(tokens_per_microbatch=tokens_per_microbatch, offload=c.offload,
                       checkpoint_activations=c.checkpoint_activations):
            metrics = imitate(model, optimizer, batch, grad_clip=c.grad_clip, device=device,
                              tokens_per_microbatch=tokens_per_microbatch)
        metrics["train/lr"] = rate
        done = step + 1
        bar.update()
        good_enough = False
        if held_out and (done == max_steps or (c.eval_interval and done % c.eval_interval == 0)):
            with no_memory(max_rows=c.max_rows), unsharded as sampler:
                metrics |= evaluate(sampler, tokenizer, held_out, c.eval_samples, seed=c.seed,
                                    max_new_tokens=c.max_new_tokens, temperature=c.temperature,
                                    max_rows=c.max_rows, stop_ids=stop_ids)
            good_enough = 0 < c.stop_at_pass1 <= metrics["eval/pass1"]
            if rank() == 0:
                bar.write(f"step {done:5d}/{max_steps} | loss {metrics['train/loss']:.3f} | "
                          f"held-out pass@1 {metrics['eval/pass1']:.3f} truncated "
                          f"{metrics['eval/truncated']:.3f} | "
                          f"{time.perf_counter() - started:.0f} s")
        if rank() == 0:
            metrics["time/elapsed"] = time.perf_counter() - started
            with open(out / "metrics.jsonl", "a") as log:
                log.write(json.dumps({"step": done} | metrics) + "\n")
            log_also(done, metrics)
        bad_steps = bad_steps + 1 if metrics["train/skipped"] else 0
        failing.check_bad_steps(bad_steps, c.out_dir)
        if good_enough:
            break
        stopped_by = max(gather([stop.signal])) if done < max_steps else 0
        if stopped_by or (done < max_steps and c.save_interval and done % c.save_interval == 0):
            saver.save(out / f"step_{done:06d}", model, optimizer, done)
        if stopped_by:
            break
    bar.close()
    if stopped_by:
        failing.end_after_signal(stopped_by, done, max_steps, out)
    saver.save(out / "final", model, optimizer, done)
    say(f"saved {out / 'final'} after {done} steps")


if __name__ == "__main__":
    failing.run(main)
