"""Train a language model from its own mistakes: TAPO (arXiv 2606.18844), Algorithm 1 from top to bottom.

    python train.py config/toy.py                         # two CPU cores, about two minutes
    python train.py config/toy.py --method=grpo           # also opsd, sft
    python train.py config/toy.py --resume=True           # continue where out_dir stopped

One step: K rollouts for each problem, scored; right and wrong ones of a group paired (Eq. 3); from every pair the policy
writes a micro-reflective trajectory; advantages per group (Eq. 1, 4, 5); one update on L_orig + lam * L_ref (Eq. 6, 8).

Deliberately missing: a value model, a KL penalty by default, a reward model, replay, top-p in rollouts.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import reflect
import reward
from advantage import (advantages, distillation_loss, kl_to_ref, loss_scales, loss_totals, nll_loss, policy_loss,
                       token_weights, train_mask)
from configurator import configure, diff_configs, print_config, run_script, save_config
from data import (BOXED_INSTRUCTION, Problem, check_prompt_fits, load_problems, load_tokenizer, problems_for_step,
                  render_prompt, stop_ids_of)
from model import load_hf, num_params, save_hf
from rollout import (EVALUATION, PAIRING, PREFIX, REFLECTION, ROLLOUT, Rollout, collate, completion_text, generate,
                     microbatches)

# --- what is learned -------------------------------------------------------------------------------------------------
method = "tapo"                # 'tapo' | 'grpo' (Eq. 2 alone) | 'opsd' (arXiv 2601.18734) | 'sft' (maximum likelihood on y_ref)
init_from = ""                 # Hugging Face folder or hub id of the start; also the reference of the KL
problems = ""                  # jsonl of {"uid", "question", "answer"}
eval_problems = ""             # held-out jsonl, measured every eval_interval; "" = none
instruction = BOXED_INSTRUCTION  # appended to every question
out_dir = "out"
resume = False                 # continue from the last checkpoint in out_dir
seed = 0
# --- the batch (Alg. 1 lines 1-6) --------------------------------------------------------------------------------------
max_steps = 500                # one epoch of the paper's 16k queries
prompts_per_step = 32          # B
samples_per_prompt = 8         # K
max_new_tokens = 8192          # longer responses are truncated, and count as wrong
temperature = 1.0              # divides the logits in the trainer too
top_p = 1.0                    # must stay 1: the trainer scores the full softmax
max_rows = 256                 # rows that decode at once
# --- micro-reflective trajectories (lines 8-14) ------------------------------------------------------------------------
n_pos = 2                      # Eq. 3: a group is eligible with at least n_pos right ...
n_neg = 4                      # ... and n_neg wrong responses
m_max = 4                      # wrong responses of a group that are reflected upon, at most
template = "long"              # 'long' | 'short' synthesis prompt (reflect.TEMPLATES); 'short' is the toy world's
prefix_mode = "micro"          # 'micro' keeps y- up to its error, 'full' is a fresh solution, 'copy' is y+ itself (control)
ref_negatives = True           # keep wrong constructions as negatives (False: 'w/o Negative', Table 4)
max_synthesis_tokens = 0       # cap of analysis + reconstruction; 0 = 2 * max_new_tokens
# --- advantages and loss (lines 17-22) ---------------------------------------------------------------------------------
decoupled = True               # G_ref normalised alone (Eq. 4, 5); False mixes it into the rollouts' group ('w/o DAE')
ref_advantage = "group"        # 'group' (Eq. 5) | 'reward' (A = r) | 'orig' | 'joint', see advantage.advantages
std = "population"             # 'population' (Eq. 1) | 'sample'
ots = True                     # Eq. 7 weights on constructed trajectories
diagnosis = "mask"             # 'mask': no gradient from the inserted diagnosis; 'ots': the paper's; 'train': weight 1
train_prefix = True            # False also masks the preserved wrong reasoning
w_min = 0.01
w_max = 10.0
lam = 1.0                      # Eq. 6
clip_eps = 0.2
loss_agg = "sequence"          # 'sequence' (Eq. 2: mean per response) | 'token' (mean over all tokens)
loss_norm = "separate"         # 'separate': each loss over its own part (Eq. 6) | 'merged': one mean over both
kl_coef = 0.0                  # the paper has no KL term ...
log_kl = True                  # ... but logs KL(policy || start); costs one forward pass
updates_per_step = 1           # passes over a step's rollouts; with 1 the ratio is exactly 1 and no old pass is needed
opsd_loss = "jsd"              # 'jsd' full-vocabulary divergence | 'sampled' policy gradient on the sampled token
opsd_beta = 0.5                # weight of the teacher in the mixture; 0 KL(teacher || student), 1 the reverse
opsd_clip = 0.0                # cut of a token's divergence; 0 = none
opsd_teacher = "initial"       # 'initial' (frozen start) | 'current' policy; both see a right solution of the group
# --- the optimiser -----------------------------------------------------------------------------------------------------
learning_rate = 1e-6
warmup_steps = 10
min_lr = 0.0                   # the cosine's floor, as a share of learning_rate
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
tokens_per_microbatch = 16384  # padded tokens of one forward / backward: the memory knob
# --- evaluation, saving, machine ---------------------------------------------------------------------------------------
eval_interval = 50             # steps; 0 = only at the end
eval_samples = 4               # per held-out problem, at `temperature`
save_interval = 50             # steps; the last step is always saved
keep_last = 2                  # checkpoints kept
parity_alarm = 0.1             # mean |sampler - trainer log-prob| above this warns: healthy is 1e-5 in fp32, 0.02 in bf16
device = "auto"                # 'auto' | 'cpu' | 'cuda'
dtype = "float32"              # compute: 'float32' | 'bfloat16'; weights and AdamW moments stay fp32 either way
threads = 0                    # CPU threads; 0 = torch's choice


def check_config(c: SimpleNamespace) -> None:
    """Refuse at start what would fail, or silently not learn, later. One line each: value, rule, fix."""
    allowed = {
        "method": ("tapo", "grpo", "opsd", "sft"), "prefix_mode": reflect.PREFIX_MODES, "template": tuple(reflect.TEMPLATES),
        "ref_advantage": ("group", "reward", "orig", "joint"), "std": ("population", "sample"),
        "diagnosis": ("mask", "ots", "train"), "loss_agg": ("sequence", "token"), "loss_norm": ("separate", "merged"),
        "opsd_loss": ("jsd", "sampled"), "opsd_teacher": ("initial", "current"),
        "device": ("auto", "cpu", "cuda"), "dtype": ("float32", "bfloat16")}
    for key, values in allowed.items():
        if getattr(c, key) not in values:
            raise ValueError(f"{key} = {getattr(c, key)!r} is unknown; use one of {', '.join(map(repr, values))}")
    for key in ("max_steps", "prompts_per_step", "max_new_tokens", "n_pos", "n_neg", "m_max", "keep_last", "max_rows",
                "tokens_per_microbatch", "updates_per_step", "eval_samples"):
        if getattr(c, key) < 1:
            raise ValueError(f"{key} = {getattr(c, key)} must be at least 1")
    if c.top_p != 1.0:
        raise ValueError(f"top_p = {c.top_p}: training rollouts must come from the full softmax that the trainer scores; "
                         "keep top_p = 1 here, eval.py takes any")
    if c.temperature <= 0:
        raise ValueError(f"temperature = {c.temperature} must be above 0: greedy rollouts of a group are all the same")
    if c.samples_per_prompt < 2:
        raise ValueError(f"samples_per_prompt = {c.samples_per_prompt} leaves nothing to compare a rollout with; use at least 2")
    if c.method in ("tapo", "sft") and c.n_pos + c.n_neg > c.samples_per_prompt:
        raise ValueError(f"n_pos + n_neg = {c.n_pos} + {c.n_neg} exceeds samples_per_prompt = {c.samples_per_prompt}: no group "
                         "could ever be eligible (Eq. 3); lower them or sample more")
    for key in ("init_from", "problems"):
        if not getattr(c, key):
            raise ValueError(f"{key} is not set; pass --{key}=PATH or a config file such as config/toy.py")


# ---------------------------------------------------------------------------------------------------------------------
# the phases of a step


def sample_rollouts(model, tokenizer, queries, prompts, c, stop_ids, step) -> list[Rollout]:
    """Alg. 1 lines 1-6: K responses to each query, not yet scored. queries [(query index, Problem)], prompts {uid: ids}."""
    completions = generate(
        model, [prompts[problem.uid] for _, problem in queries], c.samples_per_prompt, max_new_tokens=c.max_new_tokens,
        stop_ids=stop_ids, keys=[(c.seed, ROLLOUT, step, query) for query, _ in queries], temperature=c.temperature,
        max_rows=c.max_rows, progress=f"step {step + 1} rollouts")
    return [
        Rollout(uid=problem.uid, query=query, group=str(query), prompt_ids=prompts[problem.uid], completion_ids=completion.ids,
                roles=[PREFIX] * len(completion.ids), finished=completion.finished,
                text=completion_text(tokenizer, completion), sample_logprobs=completion.logprobs)
        for (query, problem), group in zip(queries, completions, strict=True) for completion in group]


def build_reflections(model, tokenizer, rollouts, problem_of, c, stop_ids, step) -> tuple[list, dict[str, int]]:
    """Alg. 1 lines 8-14: pair wrong with right (Eq. 3), let the policy write the trajectories, parse. Not yet scored.

    problem_of {query: Problem}. Returns per candidate its reflection, or the reason it was dropped; and the counts of Eq. 3.
    """
    pairs, selected = reflect.select_candidates(rollouts, n_pos=c.n_pos, n_neg=c.n_neg, m_max=c.m_max, key=(c.seed, PAIRING, step))
    if c.prefix_mode == "copy":  # the control that needs no synthesis: y_ref is y+ itself
        return [reflect.copy_correct(wrong, correct, decoupled=c.decoupled) for wrong, correct in pairs], selected
    limit = c.max_synthesis_tokens or 2 * c.max_new_tokens
    room = model.config.max_position_embeddings - limit
    prompts = [reflect.synthesis_prompt(tokenizer, problem_of[wrong.query], wrong.text, correct.text, c.template, c.prefix_mode)
               for wrong, correct in pairs]
    outcomes = ["prompt_too_long" if len(prompt) > room else None for prompt in prompts]
    fits = [j for j, outcome in enumerate(outcomes) if outcome is None]
    written = generate(
        model, [prompts[j] for j in fits], 1, max_new_tokens=limit, stop_ids=stop_ids, temperature=c.temperature,
        keys=[(c.seed, REFLECTION, step, pairs[j][0].query, j) for j in fits], max_rows=c.max_rows,
        progress=f"step {step + 1} reflections")
    for j, (completion,) in zip(fits, written, strict=True):
        wrong = pairs[j][0]
        outcomes[j] = reflect.build_reflection(tokenizer, wrong, completion, prefix_mode=c.prefix_mode, decoupled=c.decoupled,
                                               stop_id=wrong.completion_ids[-1], max_new_tokens=c.max_new_tokens)
    return outcomes, selected


def score(rollouts: list[Rollout], problem_of: dict[int, Problem]) -> None:
    """Verifiable reward of every rollout, 1 or 0, written once. An unfinished response is wrong whatever it says."""
    grades = reward.grade_many([r.text for r in rollouts], [problem_of[r.query].answer for r in rollouts])
    for r, grade in zip(rollouts, grades, strict=True):
        r.reward, r.grade, r.answer = grade.reward if r.finished else 0.0, grade.status, grade.answer
        if not r.finished:
            r.grade = "truncated"


def teacher_prompts(tokenizer, rollouts, problem_of, c, step) -> list[list[int] | None]:
    """OPSD: the prompt under which the teacher scores each rollout, the question with a right solution of its group beside it.

    None where the group has no right response other than the rollout itself: with its own text before it the teacher
    would only copy.
    """
    prompts = []
    for i, r in enumerate(rollouts):
        right = [o for j, o in enumerate(rollouts) if o.query == r.query and o.reward > 0 and j != i]
        if right:
            choice = right[np.random.default_rng((c.seed, PAIRING, step, r.query, i)).integers(len(right))]
            prompts.append(reflect.teacher_prompt(tokenizer, problem_of[r.query], choice.text, c.template))
        else:
            prompts.append(None)
    return prompts


def update(model, ref_model, optimizer, rollouts, teacher_of, c, device, autocast) -> dict[str, float]:
    """Alg. 1 lines 21-22: one step's loss over all micro-batches, `updates_per_step` times. Returns the train/* metrics.

    teacher_of: per rollout the OPSD teacher's prompt, or None for every other method.
    """
    is_reflection = torch.tensor([float(r.is_reflection) for r in rollouts])
    mask_flags = dict(diagnosis=c.diagnosis, train_prefix=c.train_prefix)
    batches = microbatches(rollouts, c.tokens_per_microbatch)

    def batch_of(index):
        return collate([rollouts[i] for i in index], [float(scale[i]) for i in index]).to(device)

    # The one denominator: trained tokens and rollouts, counted by the very mask the loss uses, before the first backward.
    trained = torch.zeros(len(rollouts), dtype=torch.int64)
    for i, r in enumerate(rollouts):
        row = train_mask(torch.ones(1, len(r.roles)), torch.tensor([r.roles]), is_reflection[i:i + 1], **mask_flags)
        trained[i] = int(row.sum())
    if c.method == "sft":       # only the constructions are imitated, and only the right ones
        trained *= torch.tensor([r.is_reflection and r.reward > 0 for r in rollouts])
    elif c.method == "opsd":
        trained *= torch.tensor([prompt is not None for prompt in teacher_of])
    totals = loss_totals(trained, is_reflection)
    scale = loss_scales(trained, is_reflection, totals, lam=1.0 if c.method == "sft" else c.lam, loss_agg=c.loss_agg,
                        loss_norm=c.loss_norm) * (trained > 0)

    # With one update the old policy IS the policy: old = new.detach(), no extra pass (trap 9).
    old = [None] * len(batches)
    if c.updates_per_step > 1:
        with torch.no_grad(), autocast:
            for b, index in enumerate(batches):
                batch = batch_of(index)
                old[b] = model(batch.inputs, batch.targets, temperature=c.temperature)[0]

    model.train()
    for u in range(c.updates_per_step):
        sums = {}               # tensors on the device: nothing in this loop waits for it
        rows = []               # per-token values of reflections, for the log
        for b, index in enumerate(batches):
            batch = batch_of(index)
            with autocast:
                if c.method == "opsd":
                    logprobs, entropy, divergence = opsd_forward(model, ref_model, batch, rollouts, index, teacher_of, c)
                else:
                    logprobs, entropy = model(batch.inputs, batch.targets, temperature=c.temperature)
                with torch.no_grad():
                    ref = ref_model(batch.inputs, batch.targets, temperature=c.temperature)[0] if c.log_kl or c.kl_coef else None
            mask = train_mask(batch.completion_mask, batch.roles, batch.is_reflection, **mask_flags) * (batch.loss_scale[:, None] > 0)
            old_logprobs = logprobs.detach() if old[b] is None else old[b]
            weights = token_weights(logprobs, entropy, batch.roles, batch.is_reflection, diagnosis=c.diagnosis, ots=c.ots,
                                    w_min=c.w_min, w_max=c.w_max)
            stats = {}
            if c.method == "sft":
                loss = nll_loss(logprobs, mask, batch.loss_scale)
            elif c.method == "opsd" and c.opsd_loss == "jsd":
                loss = distillation_loss(divergence, mask, batch.loss_scale)
            else:
                # OPSD's sampled form: the advantage of a token is how much likelier the teacher finds it
                advantage = (divergence - logprobs.detach()) if c.method == "opsd" else batch.advantages[:, None]
                loss, stats = policy_loss(logprobs, old_logprobs, torch.where(mask > 0, advantage, 0.0), mask, weights,
                                          batch.loss_scale, c.clip_eps)
            if c.kl_coef:       # on ordinary rollouts: only they are the policy's own samples, where the estimate holds
                own = mask * (1 - batch.is_reflection[:, None])
                loss = loss + c.kl_coef * (batch.loss_scale[:, None] * own * kl_to_ref(logprobs, ref, own)).sum()
            loss.backward()

            with torch.no_grad():
                own = batch.completion_mask * (1 - batch.is_reflection[:, None])
                ref_mask = mask * batch.is_reflection[:, None]
                gap = ((batch.sample_logprobs - old_logprobs) * own).abs()
                stats |= {"loss": loss.detach(), "tokens": mask.sum(), "own": own.sum(), "entropy": (entropy * own).sum(),
                          "ots": (weights * ref_mask).sum(), "ref_tokens": ref_mask.sum(), "gap": gap.sum(), "gap_max": gap.max()}
                if ref is not None:
                    stats["kl"] = kl_to_ref(logprobs, ref, own).sum()
                for key, value in stats.items():
                    together = torch.maximum if key.endswith("max") else torch.add
                    sums[key] = together(sums[key], value) if key in sums else value
                if u == 0:
                    rows += [(rollouts[i], logprobs[row].detach(), weights[row]) for row, i in enumerate(index)
                             if rollouts[i].is_reflection]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for r, logprobs, weights in rows:
        completion = slice(len(r.prompt_ids) - 1, len(r.prompt_ids) - 1 + len(r.completion_ids))
        r.logprobs, r.ots_weights = logprobs[completion].tolist(), weights[completion].tolist()
    sums = {key: float(value) for key, value in sums.items()}
    metrics = {"train/loss": sums["loss"], "train/grad_norm": float(grad_norm), "train/trained_tokens": sums["tokens"],
               "train/entropy": sums["entropy"] / max(sums["own"], 1), "train/parity_mean": sums["gap"] / max(sums["own"], 1),
               "train/parity_max": sums["gap_max"]}
    if "clipped" in sums:
        metrics |= {"train/clip_fraction": sums["clipped"] / max(sums["tokens"], 1), "train/ratio_max": sums["ratio_max"]}
    if sums["ref_tokens"]:
        metrics["train/ots_weight"] = sums["ots"] / sums["ref_tokens"]
    if "kl" in sums:
        metrics["train/kl_ref"] = sums["kl"] / max(sums["own"], 1)
    return metrics


def opsd_forward(model, ref_model, batch, rollouts, index, teacher_of, c):
    """Student and teacher on the same completions -> logprobs, entropy, and per token (B, T) the divergence to the teacher
    (opsd_loss 'jsd') or the teacher's log-prob of the sampled token ('sampled').

    The teacher reads another, longer prompt: its columns are shifted so that they meet the student's.
    """
    teacher = ref_model if c.opsd_teacher == "initial" else model
    seen = collate([dataclasses.replace(rollouts[i], prompt_ids=teacher_of[i] or rollouts[i].prompt_ids) for i in index],
                   [0.0] * len(index)).to(batch.inputs.device)
    shift = torch.tensor([len(teacher_of[i] or rollouts[i].prompt_ids) - len(rollouts[i].prompt_ids) for i in index])
    columns = torch.arange(batch.inputs.shape[1]) + shift[:, None]                              # (B, T)
    columns = columns.clamp(max=seen.inputs.shape[1] - 1).to(batch.inputs.device)
    if c.opsd_loss == "sampled":
        with torch.no_grad():
            teacher_logprobs = teacher(seen.inputs, seen.targets, temperature=c.temperature)[0].gather(1, columns)
        return *model(batch.inputs, batch.targets, temperature=c.temperature), teacher_logprobs
    with torch.no_grad():
        hidden = teacher(seen.inputs)                                                           # (B, T', d)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))          # (B, T, d)
    return model(batch.inputs, batch.targets, temperature=c.temperature,
                 teacher=(hidden, teacher.head_weight.detach(), c.opsd_beta, c.opsd_clip))


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """rollout/*: means over the step's ordinary rollouts, lengths in tokens."""
    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else float("nan")
    groups = {}
    for r in rollouts:
        groups.setdefault(r.query, []).append(r.reward)
    metrics = {
        "rollout/pass1": mean(r.reward for r in rollouts),
        "rollout/length": mean(len(r.completion_ids) for r in rollouts),
        "rollout/length_correct": mean(len(r.completion_ids) for r in rollouts if r.reward > 0),
        "rollout/length_wrong": mean(len(r.completion_ids) for r in rollouts if r.reward == 0),
        "rollout/truncated": mean(not r.finished for r in rollouts),
        "rollout/zero_variance_groups": mean(len(set(g)) == 1 for g in groups.values()),
        "rollout/reflect_rate": mean(reflect.reflects(r.text) for r in rollouts),
        "rollout/tokens": float(sum(len(r.completion_ids) for r in rollouts)),
    }
    for status in ("no_answer", "unparsable", "timeout", "error"):  # counted apart from wrong (trap 23)
        metrics[f"rollout/{status}"] = mean(r.grade == status for r in rollouts)
    return metrics


def warnings_of(metrics: dict[str, float], dry_steps: int, c) -> list[str]:
    """What a run that cannot learn looks like, said where it cannot be missed. dry_steps: steps without an eligible query."""
    found = []
    if metrics["rollout/truncated"] == 1:
        found.append(f"every response was truncated at max_new_tokens = {c.max_new_tokens}: raise it, or check the stop ids")
    if metrics["rollout/zero_variance_groups"] == 1:
        value = metrics["rollout/pass1"]
        found.append(f"this step cannot learn: all rewards of every group are equal (mean {value:.2f}), every advantage is 0; "
                     + ("the problems are too hard for this model, or the answer format is not followed" if value < 0.5
                        else "the problems are too easy for this model"))
    if metrics["train/parity_mean"] > c.parity_alarm:
        found.append(f"sampler and trainer disagree: mean |log-prob gap| {metrics['train/parity_mean']:.3f} is above parity_alarm "
                     f"= {c.parity_alarm}; stale weights, or another temperature or mask in one of the two")
    if c.method in ("tapo", "sft") and dry_steps >= 20:
        found.append(f"no query was eligible for {dry_steps} steps (Eq. 3: n_pos = {c.n_pos}, n_neg = {c.n_neg}): {c.method} has "
                     "nothing to reflect on")
    return found


def console_line(step: int, m: dict[str, float], c) -> str:
    """The numbers a person watches, one line a step."""
    line = (f"step {step:4d}/{c.max_steps} | pass@1 {m['rollout/pass1']:.3f} | len {m['rollout/length']:.1f} "
            f"cut {m['rollout/truncated']:.2f} | loss {m['train/loss']:+.4f} | grad {m['train/grad_norm']:.3f} "
            f"| kl {m.get('train/kl_ref', float('nan')):.4f}")
    if c.method in ("tapo", "sft"):
        line += (f" | y_ref {m['reflect/kept']:.0f}/{m['reflect/candidates']:.0f} right {m.get('reflect/correct', float('nan')):.2f} "
                 f"mixed {m.get('reflect/mixed_groups', float('nan')):.2f} ots {m.get('train/ots_weight', float('nan')):.2f}")
    return line + f" | lr {m['train/lr']:.1e} | {m['time/step']:.2f} s"


def evaluate_policy(model, tokenizer, problems, prompts, c, stop_ids) -> dict[str, float]:
    """Pass@1 on held-out problems, at the training temperature; the full protocol (T 0.6, Pass@k, intervals) is eval.py."""
    completions = generate(
        model, [prompts[p.uid] for p in problems], c.eval_samples, max_new_tokens=c.max_new_tokens, stop_ids=stop_ids,
        keys=[(c.seed, EVALUATION, i) for i in range(len(problems))], temperature=c.temperature, max_rows=c.max_rows,
        progress="evaluation")
    rows = [(p, completion) for p, group in zip(problems, completions, strict=True) for completion in group]
    grades = reward.grade_many([completion_text(tokenizer, completion) for _, completion in rows], [p.answer for p, _ in rows])
    right = [g.reward * completion.finished for g, (_, completion) in zip(grades, rows, strict=True)]
    return {"eval/pass1": sum(right) / len(right), "eval/truncated": sum(not completion.finished for _, completion in rows) / len(rows),
            "eval/length": sum(len(completion.ids) for _, completion in rows) / len(rows)}


# ---------------------------------------------------------------------------------------------------------------------
# what stays on disk: whole or not at all


def write_lines(path: Path, rows: list[dict]) -> None:
    """jsonl under a temporary name, then renamed: a kill leaves no torn file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(partial, path)


def save_checkpoint(folder: Path, model, tokenizer, optimizer, step: int, config: dict, keep_last: int) -> None:
    """A Hugging Face folder with train_state.pt and meta.json beside the weights; older checkpoints beyond keep_last go."""
    partial = folder.with_name("." + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_hf(model, tokenizer, partial)
        torch.save({"step": step, "optimizer": optimizer.state_dict()}, partial / "train_state.pt")
        (partial / "meta.json").write_text(json.dumps({"step": step, "config": config}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        last = checkpoints(folder.parent)
        where = last[-1] if last else "the start, there is no earlier checkpoint"
        raise OSError(e.errno, f"cannot save {folder}: {e.strerror or e}; free space, then --resume=True continues from {where}") from e
    for old in checkpoints(folder.parent)[:-keep_last]:
        shutil.rmtree(old)


def checkpoints(out_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in out_dir.glob("step_*") if (p / "meta.json").is_file())


def learning_rate_at(step: int, c) -> float:
    """Linear warm-up, then cosine to min_lr * learning_rate at max_steps. A function of the step counter alone."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.learning_rate * (c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


MAY_CHANGE_ON_RESUME = {"resume", "device", "threads", "max_rows", "eval_interval", "eval_samples", "save_interval", "keep_last",
                        "out_dir", "parity_alarm"}


def start_or_resume(config: dict, c) -> tuple[int, str]:
    """(first step to run, folder to load the policy from). Refuses to mix two runs in one out_dir."""
    out, found = Path(c.out_dir), checkpoints(Path(c.out_dir))
    if not c.resume:
        if (out / "metrics.jsonl").exists():
            raise ValueError(f"out_dir = {c.out_dir} already holds a run; pass --resume=True to continue it, or another out_dir")
        return 0, c.init_from
    if not found:
        if (out / "metrics.jsonl").exists():
            print(f"no checkpoint in {out} yet: starting again from {c.init_from}")
        return 0, c.init_from
    meta = json.loads((found[-1] / "meta.json").read_text())
    changed = [line for line in diff_configs(meta["config"], config) if line.split(":")[0] not in MAY_CHANGE_ON_RESUME]
    if changed:
        raise ValueError(f"resume with a changed config would not be the same run: {'; '.join(changed)}; set these back, or start "
                         f"a new run with --init_from={found[-1]} and another out_dir")
    return meta["step"], str(found[-1])


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    config = configure(globals())
    c = SimpleNamespace(**config)
    check_config(c)
    out = Path(c.out_dir)
    first_step, load_from = start_or_resume(config, c)
    print_config(config)
    if c.threads:
        torch.set_num_threads(c.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    autocast = torch.autocast(device, dtype=torch.bfloat16) if c.dtype == "bfloat16" else contextlib.nullcontext()

    tokenizer = load_tokenizer(load_from)
    training = load_problems(c.problems)
    held_out = load_problems(c.eval_problems) if c.eval_problems else []
    model = load_hf(load_from, device=device, num_tokens=len(tokenizer))
    ref_model = None
    if c.log_kl or c.kl_coef or (c.method == "opsd" and c.opsd_teacher == "initial"):
        ref_model = load_hf(c.init_from, device=device, num_tokens=len(tokenizer)).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay,
                                  fused=True)
    if load_from != c.init_from:
        optimizer.load_state_dict(torch.load(Path(load_from) / "train_state.pt", map_location=device)["optimizer"])
    stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
    prompts = {p.uid: render_prompt(tokenizer, p.question, c.instruction) for p in training + held_out}
    for p in training + held_out:
        check_prompt_fits(p.uid, len(prompts[p.uid]), c.max_new_tokens, model.config.max_position_embeddings)
        reward.check_gold(p.answer)
    print(batch_table(model, training, stop_ids, tokenizer, c, device))
    save_config(config, out)
    tokenizer.save_pretrained(out / "tokenizer")
    # A run that was killed after its last checkpoint has logged steps that will now be run again.
    log = out / "metrics.jsonl"
    logged = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    write_lines(log, [row for row in logged if row["step"] <= first_step])
    dry_steps = 0

    for step in range(first_step, c.max_steps):
        clock = [time.perf_counter()]

        def tick(clock=clock):
            clock.append(time.perf_counter())
            return clock[-1] - clock[-2]

        # Algorithm 1, lines 1-6: K rollouts for each query, scored
        queries = problems_for_step(training, c.seed, step, c.prompts_per_step)
        problem_of = dict(queries)
        rollouts = sample_rollouts(model, tokenizer, queries, prompts, c, stop_ids, step)
        metrics = {"time/generate": tick()}
        score(rollouts, problem_of)
        metrics |= rollout_metrics(rollouts) | {"time/grade": tick()}

        # lines 8-14: micro-reflective trajectories from the wrong ones, scored by the same reward
        outcomes, selected = [], {}
        if c.method in ("tapo", "sft"):
            outcomes, selected = build_reflections(model, tokenizer, rollouts, problem_of, c, stop_ids, step)
            score([r for r in outcomes if isinstance(r, Rollout)], problem_of)
            dry_steps = 0 if selected["eligible"] else dry_steps + 1
        reflections = [r for r in outcomes if isinstance(r, Rollout) and (r.reward > 0 or c.ref_negatives)]
        metrics["time/reflect"] = tick()
        everything = rollouts + reflections

        # lines 17-19: advantages, every group on its own (Eq. 1, 4, 5)
        for r, a in zip(everything, advantages(
                torch.tensor([r.reward for r in everything]), [r.query for r in everything], [r.group for r in everything],
                [r.is_reflection for r in everything], ref_advantage=c.ref_advantage, std=c.std).tolist(), strict=True):
            r.advantage = a

        # lines 21-22: L_orig + lam * L_ref, one update
        lr = learning_rate_at(step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        teacher_of = teacher_prompts(tokenizer, rollouts, problem_of, c, step) if c.method == "opsd" else None
        metrics |= update(model, ref_model, optimizer, everything, teacher_of, c, device, autocast) | {"train/lr": lr}
        metrics["time/update"] = tick()
        if c.method in ("tapo", "sft"):
            metrics |= reflect.reflect_metrics(reflect.reflect_sums(selected, outcomes))
        metrics["time/step"] = clock[-1] - clock[0]
        metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/generate"]

        done = step + 1
        if held_out and (done == c.max_steps or (c.eval_interval and done % c.eval_interval == 0)):
            metrics |= evaluate_policy(model, tokenizer, held_out, prompts, c, stop_ids)
            print(f"step {done:4d}/{c.max_steps} | held-out pass@1 {metrics['eval/pass1']:.3f}")
        write_lines(out / "rollouts" / f"step_{done:06d}.jsonl",
                    [{"step": done, "question": problem_of[r.query].question, "gold": problem_of[r.query].answer,
                      "prompt": tokenizer.decode(r.prompt_ids)} | dataclasses.asdict(r) for r in everything])
        with open(log, "a") as f:
            f.write(json.dumps({"step": done} | metrics) + "\n")
        print(console_line(done, metrics, c), flush=True)
        for warning in warnings_of(metrics, dry_steps, c):
            print(f"WARNING: {warning}", flush=True)
        if done == c.max_steps or (c.save_interval and done % c.save_interval == 0):
            save_checkpoint(out / f"step_{done:06d}", model, tokenizer, optimizer, done, config, c.keep_last)


def batch_table(model, training, stop_ids, tokenizer, c, device) -> str:
    """The derived numbers of the run, printed once at start."""
    rows = c.prompts_per_step * c.samples_per_prompt
    constructions = c.prompts_per_step * c.m_max if c.method in ("tapo", "sft") else 0
    return "\n".join([
        f"model        {num_params(model.config):,} parameters, {model.config.model_type}, on {device}, compute {c.dtype}",
        f"problems     {len(training):,}; {c.max_steps} steps are {c.max_steps * c.prompts_per_step / len(training):.2f} epochs",
        f"one step     {c.prompts_per_step} prompts x {c.samples_per_prompt} samples = {rows} rollouts, at most {constructions} reflections",
        f"stop ids     {', '.join(f'{i} {tokenizer.convert_ids_to_tokens(i)}' for i in stop_ids)}",
    ])


if __name__ == "__main__":
    run_script(main)
