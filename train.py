"""Train a language model from its own mistakes: TAPO (arXiv 2606.18844), Algorithm 1 from top to bottom.

    python train.py config/toy.py                         # two CPU cores, about two minutes
    python train.py config/toy.py --method=grpo           # also opsd, sft
    python train.py config/toy.py --resume=True           # continue where out_dir stopped
    torchrun --nproc_per_node=8 train.py config/aime.py   # FSDP2 over 8 GPUs; --nnodes=2 --rdzv_endpoint=HOST:PORT for more

One step: K rollouts for each problem, scored; right and wrong ones of a group paired (Eq. 3); from every pair the policy
writes a micro-reflective trajectory; advantages per group (Eq. 1, 4, 5); one update on L_orig + lam * L_ref (Eq. 6, 8).

Deliberately missing: a value model, a KL penalty by default, a reward model, replay, top-p in rollouts.
"""
import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import failing
import jsonl
import opsd
import parallel
import reflect
import reward
from advantage import (
    advantages,
    distillation_loss,
    kl_to_ref,
    loss_scales,
    loss_totals,
    nll_loss,
    ots_weights,
    policy_loss,
    token_weights,
    train_mask,
)
from checkpoint import Saver, check_same_model, find_start, keep_log, load_optimizer
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
    stop_ids_of,
)
from metrics import add_up, console_line, means, open_log, rollout_sums, warnings_of
from model import load_hf
from parallel import balance, gather, reduce_sums, unsharded, whole
from plan import plan_table
from rollout import EVALUATION, FILLER, PAIRING, PREFIX, REFLECTION, ROLLOUT, Rollout, collate, completion_text, generate

# --- what is learned -------------------------------------------------------------------------------------------------
method: one_of("tapo", "grpo", "opsd", "sft") = "tapo"  # grpo: Eq. 2 alone; opsd: arXiv 2601.18734; sft: likelihood of y_ref
init_from = ""                                  # Hugging Face folder or hub id of the start; also the reference of the KL
problems = ""                                   # jsonl of {"uid", "question", "answer"}
eval_problems = ""                              # held-out jsonl, measured every eval_interval; "" = none
instruction = BOXED_INSTRUCTION                 # appended to every question
out_dir = "out"
resume = False                                  # continue from the last checkpoint in out_dir
seed: at_least(0) = 0
# --- the batch (Alg. 1 lines 1-6) --------------------------------------------------------------------------------------
max_steps: at_least(1) = 500                    # one epoch of the paper's 16k queries
prompts_per_step: at_least(1) = 32              # B
samples_per_prompt: at_least(2) = 8             # K
max_new_tokens: at_least(1) = 8192              # longer responses are truncated, and count as wrong
temperature: above(0) = 1.0                     # divides the logits in the trainer too
top_p = 1.0                                     # must stay 1: the trainer scores the full softmax
max_rows: at_least(0) = 256                     # rows that decode at once; 0: as many as free memory holds
# --- micro-reflective trajectories (lines 8-14) ------------------------------------------------------------------------
n_pos: at_least(1) = 2                          # Eq. 3: a group is eligible with at least n_pos right ...
n_neg: at_least(1) = 4                          # ... and n_neg wrong responses
m_max: at_least(1) = 4                          # wrong responses of a group that are reflected upon, at most
template: one_of(*reflect.TEMPLATES) = "long"   # synthesis prompt (reflect.TEMPLATES); short is the toy world's
prefix_mode: one_of(*reflect.PREFIX_MODES) = "micro"  # micro keeps y- up to its error, full is a fresh solution, copy is y+
ref_negatives = True                            # keep wrong constructions as negatives (False: 'w/o Negative', Table 4)
max_synthesis_tokens: at_least(0) = 0           # cap of analysis + reconstruction; 0 = 2 * max_new_tokens
# --- advantages and loss (lines 17-22) ---------------------------------------------------------------------------------
decoupled = True  # G_ref normalised alone (Eq. 4, 5); False mixes it into the rollouts' group ('w/o DAE')
ref_advantage: one_of("group", "reward", "orig", "joint") = "group"  # group: Eq. 5; reward: A = r; see advantage.advantages
std: one_of("population", "sample") = "population"  # population: Eq. 1
ots = True                                      # Eq. 7 weights on constructed trajectories
diagnosis: one_of("mask", "ots", "train") = "mask"  # mask: none from the inserted diagnosis; ots: the paper's; train: weight 1
train_prefix = True                             # False also masks the preserved wrong reasoning
w_min: at_least(0) = 0.01                       # Eq. 7 clips to [w_min, w_max]
w_max: above(0) = 10.0
lam: at_least(0) = 1.0                          # Eq. 6
clip_eps: above(0) = 0.2                        # Eq. 2
loss_agg: one_of("sequence", "token") = "sequence"  # sequence: Eq. 2's mean per response; token: over all tokens
loss_norm: one_of("separate", "merged") = "separate"  # separate: each loss over its own part (Eq. 6); merged: one mean over both
kl_coef: at_least(0) = 0.0                      # the paper has no KL term ...
log_kl = True                                   # ... but logs KL(policy || start); costs one forward pass
updates_per_step: at_least(1) = 1  # passes over a step's rollouts; with 1 the ratio is exactly 1 and no old pass is needed
opsd_loss: one_of("jsd", "sampled") = "jsd"     # jsd: full-vocabulary divergence; sampled: policy gradient on the sampled token
opsd_beta: between(0, 1) = 0.5                  # weight of the teacher in the mixture; 0 KL(teacher || student), 1 the reverse
opsd_clip: at_least(0) = 0.0                    # cut of a token's divergence; 0 = none
opsd_teacher: one_of("initial", "current") = "initial"  # initial: the frozen start; both see a right solution of the group
# --- the optimiser -----------------------------------------------------------------------------------------------------
learning_rate: at_least(0) = 1e-6
warmup_steps: at_least(0) = 10
min_lr: between(0, 1) = 0.0                     # the cosine's floor, as a share of learning_rate
weight_decay: at_least(0) = 0.0
beta1: between(0, 0.9999) = 0.9
beta2: between(0, 0.9999) = 0.999
grad_clip: above(0) = 1.0
tokens_per_microbatch: at_least(1) = 16384      # padded tokens of one forward / backward: the memory knob
checkpoint_activations = False  # recompute every block in the backward pass: a third more work, the memory of one block
# --- evaluation, saving, machine ---------------------------------------------------------------------------------------
plan = False                                    # print what the run will cost, from config.json alone, and stop
plan_gpus: at_least(0) = 0                      # ... on so many GPUs; 0 = what is here
plan_gpu_gb: at_least(0) = 0.0                  # ... of so much memory
eval_interval: at_least(0) = 50                 # steps; 0 = only at the end
eval_samples: at_least(1) = 4                   # per held-out problem, at `temperature`
save_interval: at_least(0) = 50                 # steps; the last step is always saved
keep_last: at_least(1) = 2                      # checkpoints kept, beside the best of them by held-out Pass@1
async_save = False                              # write them in the background; host memory for a copy of weights and moments
max_bad_steps: at_least(1) = 3                  # in a row: loss or gradient not finite, update skipped; then the run stops
log_to: one_of("", "wandb", "tensorboard") = ""  # besides metrics.jsonl (wandb: project $WANDB_PROJECT or tapo)
parity_alarm: above(0) = 0.1  # mean |sampler - trainer log-prob| above this warns: healthy is 1e-5 in fp32, 0.02 in bf16
device: one_of("auto", "cpu", "cuda") = "auto"
replicas: at_least(1) = 1  # HSDP: shard within world_size / replicas ranks (a node), replicate across; 1 = shard over all
offload = False                                 # keep shards of weights and moments in host memory
timeout_minutes: above(0) = 60.0  # a collective that waits longer ends the job: longer than any rank may decode alone
dtype: one_of("float32", "bfloat16") = "float32"  # of products; weights and AdamW moments stay fp32 either way
sample_dtype: one_of("", "bfloat16") = ""       # '' is dtype; bfloat16 beside fp32 training: train/parity_* says how far off
compile = False                                 # torch.compile: a minute at start, then a quarter faster on a CPU
threads: at_least(0) = 0                        # CPU threads; 0 = torch's choice


def check_config(c: SimpleNamespace) -> None:
    """Refuse at start what would fail, or silently not learn, later. One line each: value, rule, fix."""
    if c.top_p != 1.0:
        raise ValueError(f"top_p = {c.top_p}: training rollouts must come from the full softmax, which the trainer scores; "
                         "keep top_p = 1 here, eval.py takes any")
    if c.w_min > c.w_max:
        raise ValueError(f"w_min = {c.w_min} exceeds w_max = {c.w_max}: Eq. 7 clips weights into [w_min, w_max]; swap them")
    if c.method in ("tapo", "sft") and c.n_pos + c.n_neg > c.samples_per_prompt:
        raise ValueError(f"n_pos + n_neg = {c.n_pos} + {c.n_neg} exceeds samples_per_prompt = {c.samples_per_prompt}: no group "
                         "could ever be eligible (Eq. 3); lower them or sample more")
    for key in ("init_from", "problems"):
        if not getattr(c, key):
            raise ValueError(f"{key} is not set; pass --{key}=PATH or a config file such as config/toy.py")


# ----------------------------------------------------------------------------------------------------------------------
# the phases of a step


def sample_rollouts(model, tokenizer, queries, stop_ids, c, step) -> list[Rollout]:
    """Alg. 1 lines 1-6: K responses to each query, not yet scored. queries [(query, Problem)]."""
    completions = generate(
        model, [problem.prompt_ids for _, problem in queries], c.samples_per_prompt, max_new_tokens=c.max_new_tokens,
        stop_ids=stop_ids, keys=[(c.seed, ROLLOUT, step, query) for query, _ in queries], temperature=c.temperature,
        max_rows=c.max_rows, progress=f"step {step + 1} rollouts")
    return [
        Rollout(uid=problem.uid, query=query, group=str(query), prompt_ids=problem.prompt_ids,
                completion_ids=completion.ids, roles=[PREFIX] * len(completion.ids), finished=completion.finished,
                text=completion_text(tokenizer, completion), sample_logprobs=completion.logprobs)
        for (query, problem), group in zip(queries, completions, strict=True) for completion in group]


def build_reflections(model, tokenizer, rollouts, problem_of, stop_ids, c, step) -> tuple[list, dict[str, int]]:
    """Alg. 1 lines 8-14: pair wrong with right (Eq. 3), let the policy write the trajectories, parse. Not yet scored.

    problem_of {query: Problem}. Returns per candidate its reflection or the reason it was dropped, and the counts of Eq. 3.
    """
    pairs, selected = reflect.select_candidates(
        rollouts, n_pos=c.n_pos, n_neg=c.n_neg, m_max=c.m_max, key=(c.seed, PAIRING, step))
    if c.prefix_mode == "copy":  # the control that needs no synthesis: y_ref is y+ itself
        return [reflect.copy_correct(wrong, correct, decoupled=c.decoupled) for wrong, correct in pairs], selected
    limit = c.max_synthesis_tokens or 2 * c.max_new_tokens
    # a candidate's noise depends on its own query alone, not on which other queries this process holds
    number = [sum(earlier.query == wrong.query for earlier, _ in pairs[:j]) for j, (wrong, _) in enumerate(pairs)]
    prompts = [reflect.synthesis_prompt(tokenizer, problem_of[wrong.query], wrong.text, correct.text, c.template, c.prefix_mode)
               for wrong, correct in pairs]
    fits = [j for j, prompt in enumerate(prompts) if len(prompt) + limit <= model.config.max_position_embeddings]
    written = generate(
        model, [prompts[j] for j in fits], 1, max_new_tokens=limit, stop_ids=stop_ids, temperature=c.temperature,
        keys=[(c.seed, REFLECTION, step, pairs[j][0].query, number[j]) for j in fits], max_rows=c.max_rows,
        progress=f"step {step + 1} reflections")
    outcomes = ["prompt_too_long"] * len(pairs)
    for j, (completion,) in zip(fits, written, strict=True):
        wrong = pairs[j][0]
        outcomes[j] = reflect.build_reflection(
            tokenizer, wrong, completion, prefix_mode=c.prefix_mode, decoupled=c.decoupled,
            stop_id=wrong.completion_ids[-1], max_new_tokens=c.max_new_tokens)
    return outcomes, selected


def score(rollouts: list[Rollout], problem_of: dict[int, Problem]) -> None:
    """Verifiable reward of every rollout, 1 or 0, written once. An unfinished response is wrong whatever it says."""
    grades = reward.grade_many([r.text for r in rollouts], [problem_of[r.query].answer for r in rollouts])
    for r, grade in zip(rollouts, grades, strict=True):
        r.reward, r.grade, r.answer = grade.reward, grade.status, grade.answer
        if not r.finished:
            r.reward, r.grade = 0.0, "truncated"


def update(model, ref_model, optimizer, rollouts, teacher_of, c, rank, world, device, autocast) -> dict[str, float]:
    """Alg. 1 lines 21-22: the loss of the whole step's rollouts, `updates_per_step` times -> sums for the train/* metrics.

    Every rank is given all rollouts and works on its share of micro-batches. teacher_of: per rollout the prompt of its OPSD
    teacher; None for every other method.
    """
    filler = len(rollouts)
    rollouts, teacher_of = [*rollouts, FILLER], teacher_of and [*teacher_of, None]  # where a rank has nothing left to do
    is_reflection = torch.tensor([float(r.is_reflection) for r in rollouts])
    flags = {"diagnosis": c.diagnosis, "train_prefix": c.train_prefix}
    trained = [int(train_mask(torch.ones(1, len(r.roles)), torch.tensor([r.roles]), is_reflection[i:i + 1], **flags).sum())
               for i, r in enumerate(rollouts)]
    if c.method == "sft":     # imitates constructions alone, and only the right ones
        trained = [n * (r.is_reflection and r.reward > 0) for n, r in zip(trained, rollouts, strict=True)]
    elif c.method == "opsd":  # needs a teacher who has seen a right solution
        trained = [n * bool(prompt) for n, prompt in zip(trained, teacher_of, strict=True)]
    trained = torch.tensor([*trained[:-1], 0])  # the filler counts nowhere
    # CRITICAL: the one denominator, counted over the whole step by the mask the loss uses, before the first backward.
    scales = loss_scales(trained, is_reflection, loss_totals(trained, is_reflection), lam=c.lam if c.method == "tapo" else 1.0,
                         loss_agg=c.loss_agg, loss_norm=c.loss_norm)
    scales = (scales * (trained > 0)).tolist()

    # A row of advantage 0 (a group all right or all wrong) counts in the denominator and has no gradient: it is only
    # looked at, by a forward pass for the logs. Each kind of micro-batch comes equally often on every rank.
    # CRITICAL: those come first. FSDP keeps the root gathered after a forward until a backward; were there none, the optimiser
    # would see gathered copies instead of its own embedding, norm and head.
    exact_zero = c.method in ("tapo", "grpo") and not c.kl_coef
    learning = [i for i in range(filler) if trained[i] and not (exact_zero and rollouts[i].advantage == 0)]
    watched = sorted(set(range(filler)) - set(learning))
    as_read = opsd.as_read(rollouts, teacher_of) if teacher_of else rollouts  # a teacher's prompt makes the longer row
    batches = [(learn, [rows[j] if j < len(rows) else filler for j in batch])
               for learn, rows in ((False, watched), (True, learning or [filler]))
               for batch in balance([as_read[i] for i in rows], c.tokens_per_microbatch, rank, world)]

    def batch_of(index: list[int]):
        return collate([rollouts[i] for i in index], [scales[i] for i in index]).to(device)

    # With one update the old policy is the policy itself: old = new.detach(), no pass spent on it (trap 9).
    old = {}
    if c.updates_per_step > 1:
        with torch.no_grad(), autocast:
            for b, (_, index) in enumerate(batches):
                batch = batch_of(index)
                old[b] = model(batch.inputs, batch.targets, temperature=c.temperature)[0]

    model.train()
    skipped = 0.0
    for _ in range(c.updates_per_step):
        sums, rows = {}, []     # on the device until the loop is over: nothing in it waits for the device
        for b, (learn, index) in enumerate(batches):
            batch = batch_of(index)
            with autocast, torch.set_grad_enabled(learn):
                if c.method == "opsd":
                    logprobs, entropy, teacher = opsd.student_and_teacher(
                        model, ref_model if c.opsd_teacher == "initial" else model, batch, [rollouts[i] for i in index],
                        [teacher_of[i] for i in index], temperature=c.temperature, loss=c.opsd_loss, beta=c.opsd_beta,
                        clip=c.opsd_clip)
                else:
                    logprobs, entropy = model(batch.inputs, batch.targets, temperature=c.temperature)
                if c.log_kl or c.kl_coef:
                    with torch.no_grad():
                        ref_logprobs = ref_model(batch.inputs, batch.targets, temperature=c.temperature)[0]
            old_logprobs = old.get(b, logprobs.detach())
            mask = train_mask(batch.completion_mask, batch.roles, batch.is_reflection, **flags)
            mask = mask * (batch.loss_scale > 0)[:, None]
            weights = token_weights(logprobs, entropy, batch.roles, batch.is_reflection, diagnosis=c.diagnosis, ots=c.ots,
                                    w_min=c.w_min, w_max=c.w_max)
            if c.method == "sft":
                loss = nll_loss(logprobs, mask, batch.loss_scale)
            elif c.method == "opsd" and c.opsd_loss == "jsd":
                loss = distillation_loss(teacher, mask, batch.loss_scale)
            else:
                # OPSD on the sampled token alone: its advantage is how much likelier the teacher finds it
                advantage = teacher - logprobs.detach() if c.method == "opsd" else batch.advantages[:, None]
                loss, stats = policy_loss(logprobs, old_logprobs, torch.where(mask > 0, advantage, 0.0), mask, weights,
                                          batch.loss_scale, c.clip_eps)
                add_up(sums, {"train/clip_fraction": stats["clipped"], "train/clip_fraction#": mask.sum(),
                              "train/ratio_max": stats["ratio_max"]})
            own = batch.completion_mask * (1 - batch.is_reflection[:, None])  # the policy's own samples
            if c.kl_coef:       # on those only: elsewhere the estimate is not one of the KL
                kl = kl_to_ref(logprobs, ref_logprobs, own * mask)
                loss = loss + c.kl_coef * (batch.loss_scale[:, None] * kl).sum()
            if learn:
                (loss * world).backward()  # FSDP averages gradients over ranks; the denominator is already that of all of them

            with torch.no_grad():
                constructed = mask * batch.is_reflection[:, None]
                gap = own * (batch.sample_logprobs - old_logprobs).abs()
                add_up(sums, {
                    "train/loss": loss.detach(), "train/trained_tokens": mask.sum(),
                    "train/entropy": (own * entropy).sum(), "train/entropy#": own.sum(),
                    "train/parity_mean": gap.sum(), "train/parity_mean#": own.sum(), "train/parity_max": gap.max(),
                    "train/ots_weight": (constructed * weights).sum(), "train/ots_weight#": constructed.sum()})
                if c.log_kl or c.kl_coef:
                    add_up(sums, {"train/kl_ref": kl_to_ref(logprobs, ref_logprobs, own).sum(), "train/kl_ref#": own.sum()})
                raw = ots_weights(logprobs, entropy, c.w_min, c.w_max)  # whatever the flags: what Eq. 7 says of every token
                rows += [(i, logprobs[row], raw[row]) for row, i in enumerate(index) if rollouts[i].is_reflection]
        sums = optimizer_step(model, optimizer, sums, c.grad_clip)
        skipped += sums["train/skipped"]

    for i, logprobs, raw in gather([(i, logprobs.tolist(), raw.tolist()) for i, logprobs, raw in rows]):
        completion = slice(len(rollouts[i].prompt_ids) - 1, len(rollouts[i].prompt_ids) - 1 + len(rollouts[i].completion_ids))
        rollouts[i].logprobs, rollouts[i].ots_weights = logprobs[completion], raw[completion]
    return sums | {"train/skipped": skipped}


def optimizer_step(model, optimizer, sums: dict, grad_clip: float) -> dict[str, float]:
    """Clip the gradient and step -> the sums of all processes with train/grad_norm and train/skipped.

    Where loss or gradient is not finite the update is skipped: weights and moments stay as they are.
    Both numbers are those of all processes, so all decide alike."""
    norm = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)))
    sums = reduce_sums({name: float(value) for name, value in sums.items()})
    finite = math.isfinite(sums["train/loss"]) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"train/grad_norm": norm, "train/skipped": float(not finite)}


def evaluate(model, tokenizer, problems, stop_ids, c, rank=0, world=1) -> dict[str, float]:
    """Pass@1 on held-out problems at the training temperature. The full protocol (T 0.6, Pass@k, intervals) is eval.py's."""
    numbers, problems = range(len(problems))[rank::world], problems[rank::world]
    completions = generate(
        model, [p.prompt_ids for p in problems], c.eval_samples, max_new_tokens=c.max_new_tokens, stop_ids=stop_ids,
        keys=[(c.seed, EVALUATION, i) for i in numbers], temperature=c.temperature, max_rows=c.max_rows,
        progress="evaluation" if rank == 0 else "")
    rows = [(problem, completion) for problem, group in zip(problems, completions, strict=True) for completion in group]
    grades = reward.grade_many([completion_text(tokenizer, x) for _, x in rows], [problem.answer for problem, _ in rows])
    sums = {"eval/pass1": sum(g.reward for g, (_, x) in zip(grades, rows, strict=True) if x.finished),
            "eval/truncated": sum(not x.finished for _, x in rows), "eval/length": sum(len(x.ids) for _, x in rows)}
    return means(reduce_sums(sums | {name + "#": len(rows) for name in sums}))


def learning_rate_at(step: int, c) -> float:
    """Linear warm-up, then cosine down to min_lr * learning_rate at max_steps: a function of the step counter alone."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.learning_rate * (c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Algorithm 1: the loop over steps, each phase one call."""
    config = configure(globals())
    c = SimpleNamespace(**config)
    check_config(c)
    parallel.check_world(c.replicas, c.prompts_per_step)
    config["problems_mark"] = file_mark(c.problems)  # a resumed run must find the problems it began with
    cost = plan_table(config)
    if c.plan:
        print(cost)
        return
    first_step, load_from = find_start(config)
    rank, world, device = parallel.start(c.device, c.timeout_minutes)
    parallel.check_shared(c.out_dir, first_step)
    say = print if rank == 0 else lambda *_, **__: None
    if rank == 0:
        print_config(config)
        print(cost, flush=True)
        log_also = open_log(c.log_to, config, first_step)
    if c.threads:
        torch.set_num_threads(c.threads)

    wrap, autocast = parallel.precision(c, world, device)  # explicit FSDP2; neither with one process in fp32
    sampling = autocast if c.sample_dtype in ("", c.dtype) else torch.autocast(device, dtype=torch.bfloat16)
    training, held_out = load_problems(c.problems), load_problems(c.eval_problems) if c.eval_problems else []
    tokenizer = load_tokenizer(load_from)
    model = load_hf(load_from, device=device, num_tokens=len(tokenizer), wrap=wrap, compile=c.compile)
    model.checkpoint_activations = c.checkpoint_activations
    stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
    encode_prompts(tokenizer, training + held_out, c.instruction)
    check_prompts_fit(training + held_out, c.max_new_tokens, model.config.max_position_embeddings)
    ref_model = None            # the frozen start
    if c.log_kl or c.kl_coef or (c.method == "opsd" and c.opsd_teacher == "initial"):
        ref_model = load_hf(c.init_from, device=device, num_tokens=len(tokenizer), wrap=wrap, compile=c.compile)
        ref_model.requires_grad_(False)
        check_same_model(load_from, model.config, c.init_from, ref_model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2),
                                  weight_decay=c.weight_decay, fused=True)
    if first_step:
        load_optimizer(Path(load_from), model, optimizer)
    say(run_table(training, stop_ids, tokenizer, c, device, world), flush=True)

    out = Path(c.out_dir)
    if rank == 0:
        save_config(config, out)
        tokenizer.save_pretrained(out / "tokenizer")
        keep_log(out / "metrics.jsonl", first_step)
    saver = Saver(tokenizer, config, background=c.async_save)
    stop = failing.Stop()
    dry_steps = lost_steps = bad_steps = 0  # in a row: no eligible query, no candidate that became a y_ref, no update
    done = first_step
    for step in range(first_step, c.max_steps):
        clock = [time.perf_counter()]

        def lap(clock=clock) -> float:
            clock.append(time.perf_counter())
            return clock[-1] - clock[-2]

        queries = problems_for_step(training, c.seed, step, c.prompts_per_step)
        problem_of = dict(queries)
        with failing.out_of_memory_names(c, "max_rows"), unsharded(model) as sampler, sampling:
            # Algorithm 1, lines 1-6: K rollouts of every query, scored. Each process takes its share of the queries.
            rollouts = sample_rollouts(sampler, tokenizer, queries[rank::world], stop_ids, c, step)
            sums = {"time/generate": lap()}
            score(rollouts, problem_of)
            sums["time/grade"] = lap()
            # lines 8-14: from the mistakes among them, micro-reflective trajectories, scored alike
            outcomes, selected = [], {}
            if c.method in ("tapo", "sft"):
                outcomes, selected = build_reflections(sampler, tokenizer, rollouts, problem_of, stop_ids, c, step)
                score([r for r in outcomes if isinstance(r, Rollout)], problem_of)
            sums["time/reflect"] = lap()
        # From here on every process knows all of them, in the same order for any number of processes.
        rollouts = sorted(gather(rollouts), key=lambda r: r.query)
        outcomes, selected = gather(outcomes), reduce_sums(selected)
        reflections = [r for r in outcomes if isinstance(r, Rollout) and (r.reward > 0 or c.ref_negatives)]
        everything = rollouts + sorted(reflections, key=lambda r: r.query)
        dry_steps = 0 if selected.get("eligible") else dry_steps + 1

        # lines 17-19: advantages, every group by itself (Eq. 1, 4, 5)
        values = advantages(torch.tensor([r.reward for r in everything]), [r.query for r in everything],
                            [r.group for r in everything], [r.is_reflection for r in everything],
                            ref_advantage=c.ref_advantage, std=c.std)
        for r, value in zip(everything, values.tolist(), strict=True):
            r.advantage = value

        # lines 21-22: L_orig + lam * L_ref (Eq. 6), one update
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, c)
        teacher_of = None
        if c.method == "opsd":
            teacher_of = opsd.teacher_prompts(tokenizer, rollouts, problem_of, c.template, (c.seed, PAIRING, step),
                                              model.config.max_position_embeddings)
            sums |= opsd.teacher_sums(rollouts, teacher_of)
        lap()
        with failing.out_of_memory_names(c, "tokens_per_microbatch", "checkpoint_activations", "offload"):
            sums |= update(model, ref_model, optimizer, everything, teacher_of, c, rank, world, device, autocast)
        sums |= {"train/lr": learning_rate_at(step, c), "time/update": lap(), "time/step": clock[-1] - clock[0]}

        done = step + 1
        sums |= rollout_sums(rollouts)
        if selected:
            sums |= {f"reflect/{name}": value for name, value in reflect.reflect_sums(selected, outcomes).items()}
        metrics = means(sums)
        metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/generate"]
        if held_out and (done == c.max_steps or (c.eval_interval and done % c.eval_interval == 0)):
            with failing.out_of_memory_names(c, "max_rows"), unsharded(model) as sampler, sampling:
                metrics |= evaluate(sampler, tokenizer, held_out, stop_ids, c, rank, world)
            say(f"step {done:4d}/{c.max_steps} | held-out pass@1 {metrics['eval/pass1']:.3f}")
        if rank == 0:
            jsonl.write(out / "rollouts" / f"step_{done:06d}.jsonl", [
                {"step": done, "question": problem_of[r.query].question, "gold": problem_of[r.query].answer,
                 "prompt": tokenizer.decode(r.prompt_ids)} | dataclasses.asdict(r) for r in everything])
            with open(out / "metrics.jsonl", "a") as log:
                log.write(json.dumps({"step": done} | metrics) + "\n")
            log_also(done, metrics)
        say(console_line(done, metrics, c), flush=True)
        if metrics.get("reflect/candidates"):
            lost_steps = 0 if metrics["reflect/kept"] else lost_steps + 1
        for warning in warnings_of(metrics, dry_steps, lost_steps, c):
            say(f"WARNING: {warning}", flush=True)
        bad_steps = bad_steps + 1 if metrics["train/skipped"] else 0
        failing.check_bad_steps(bad_steps, c)
        stopped_by = max(gather([stop.signal]))  # in one process is enough: all end together
        if stopped_by or done == c.max_steps or (c.save_interval and done % c.save_interval == 0):
            saver.save(out / f"step_{done:06d}", model, optimizer, done, metrics.get("eval/pass1"))
        saver.check()
        if stopped_by:
            break
    saver.wait()
    if done < c.max_steps:
        failing.end_after_signal(stopped_by, done, c.max_steps, out, say)


def run_table(training, stop_ids, tokenizer, c, device, world) -> str:
    """What the loaded run amounts to, printed once at start beside the plan."""
    lengths = sorted(len(p.prompt_ids) for p in training)
    return "\n".join([
        f"processes   {world} on {device}, compute in {c.dtype}",
        f"problems    {len(training):,}, prompts of {lengths[0]} to {lengths[-1]} tokens; "
        f"{c.max_steps} steps are {c.max_steps * c.prompts_per_step / len(training):.2f} epochs",
        f"stop ids    {', '.join(f'{i} {tokenizer.convert_ids_to_tokens(i)}' for i in stop_ids)}"])


if __name__ == "__main__":
    failing.run(main)
