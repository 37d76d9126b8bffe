r"""Train a language model from its own mistakes: TAPO (arXiv 2606.18844), Algorithm 1.

    python train.py config/toy.py config/tapo.py          # two CPU cores, about two minutes
    python train.py config/toy.py config/grpo.py          # also opsd, published
    python train.py config/toy.py config/tapo.py --resume=True  # continue where out_dir stopped
    torchrun --nproc_per_node=8 train.py config/aime.py   # FSDP2 over 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT \
      train.py config/aime.py --replicas=2

One step: sample and score K rollouts per problem; pair wrong and right rollouts of a group (Eq. 3);
let the policy write a micro-reflective trajectory for each pair; normalise advantages per group
(Eq. 1, 4, 5); update on L_orig + lam * L_ref (Eq. 6, 8), with token weights in L_ref (Eq. 7).

Deliberately missing: a value model, a KL penalty by default, a reward model, replay, top-p in
rollouts (the trainer scores the full softmax).
"""
import functools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import failing
import jsonl
import opsd
import parallel
import reflect
from advantage import WEIGHTINGS, distillation_loss, kl_to_ref, nll_loss, policy_loss
from checkpoint import Saver, check_same_model, find_start, keep_log, load_optimizer
from configurator import (
    above,
    at_least,
    between,
    configure,
    one_of,
    print_config,
    save_config,
)
from data import (
    BOXED_INSTRUCTION,
    check_prompts_fit,
    encode_prompts,
    file_mark,
    load_problems,
    load_tokenizer,
    problems_for_step,
    stop_ids_of,
)
from hf import load_hf
from metrics import (
    add_up,
    console_line,
    evaluate,
    means,
    open_log,
    reduce_sums,
    reflect_sums,
    rollout_sums,
    train_sums,
    warnings_of,
)
from parallel import Unsharded, gather, rank, say, world_size
from reward import score
from rollout import PAIRING, REFLECTION, ROLLOUT, Decoder, Rollout, sample_rollouts
from update import (
    largest_microbatch,
    set_advantages,
    set_learning_rate,
    set_loss_scales,
    set_old_logprobs,
    update,
)

# --- what is learned ------------------------------------------------------------------------------
method: one_of("tapo", "grpo", "opsd", "sft") = "tapo"  # grpo: Eq. 2; sft: likelihood of y_ref
init_from = ""              # initial policy and KL reference: Hugging Face folder or hub id
problems = ""               # jsonl of {"uid", "question", "answer"}
eval_problems = ""          # held-out jsonl, evaluated every eval_interval; "" = none
instruction = BOXED_INSTRUCTION  # appended to every question
out_dir = "out"
resume = False              # continue from the last checkpoint in out_dir
seed: at_least(0) = 0
# --- the batch (Alg. 1 lines 1-6) -----------------------------------------------------------------
max_steps: at_least(1) = 500            # one epoch of the paper's 16k queries
prompts_per_step: at_least(1) = 32      # B
samples_per_prompt: at_least(2) = 8     # K
max_new_tokens: at_least(1) = 8192      # longer responses are truncated, and count as wrong
temperature: above(0) = 1.0             # divides the logits in the trainer too
max_rows: at_least(0) = 256             # rows that decode at once; 0: as many as free memory holds
# --- micro-reflective trajectories (lines 8-14) ---------------------------------------------------
n_pos: at_least(1) = 2                  # Eq. 3: right responses an eligible group needs
n_neg: at_least(1) = 4                  # Eq. 3: wrong responses an eligible group needs
m_max: at_least(1) = 4                  # Eq. 3: maximum wrong responses per group to reflect on
template: one_of(*reflect.TEMPLATES) = "long"           # synthesis prompt
prefix_mode: one_of(*reflect.PREFIX_MODES) = "micro"    # micro: y_ref keeps y-, error included
# constructions to train on; right: correct ones ('w/o Negative'); faithful: no false statement
keep: one_of("all", "right", "faithful") = "all"
max_synthesis_tokens: at_least(0) = 0   # cap of analysis + reconstruction; 0 = 2 * max_new_tokens
# --- advantages and loss (lines 17-22) ------------------------------------------------------------
# constructions are a separate group (Eq. 4, 5); False: 'w/o DAE', Eq. 1 over all rows of a query
decoupled = True
# advantage of constructions; group: Eq. 5; reward: A = r; orig, joint: see advantage.advantages
ref_advantage: one_of("group", "reward", "orig", "joint") = "group"
weighting: one_of(*WEIGHTINGS) = "ots"  # token weights of constructions (Eq. 7); none: 'w/o OTS'
# diagnosis tokens; mask: no gradient; ots: weighted like the rest (the paper); train: weight 1
diagnosis: one_of("mask", "ots", "train") = "mask"
train_prefix = True                     # False also masks the preserved wrong reasoning
w_min: at_least(0) = 0.01               # Eq. 7 clamps weights to [w_min, w_max]
w_max: above(0) = 10.0
lam: at_least(0) = 1.0                  # Eq. 6
clip_eps: above(0) = 0.2                # Eq. 2
loss_agg: one_of("sequence", "token") = "sequence"    # sequence: Eq. 2's mean per response
loss_norm: one_of("separate", "merged") = "separate"  # separate: means of L_orig and L_ref (Eq. 6)
kl_coef: at_least(0) = 0.0              # weight of the KL to init_from; the paper has no KL loss
log_kl = True                           # log KL(policy || init_from) (Fig. 3): one more forward
updates_per_step: at_least(1) = 1       # with 1 the ratio of Eq. 2 is exactly 1
opsd_loss: one_of("jsd", "sampled") = "jsd"  # jsd: full vocabulary; sampled: sampled tokens only
opsd_beta: between(0, 1) = 0.5          # weight of the teacher in the mixture
opsd_clip: at_least(0) = 0.0            # maximum divergence of a token; 0 = no clipping
# --- the optimiser (AdamW, no weight decay) -------------------------------------------------------
learning_rate: at_least(0) = 1e-6       # after warm-up a cosine to 0
warmup_steps: at_least(0) = 10
grad_clip: above(0) = 1.0
tokens_per_microbatch: at_least(0) = 0  # padded tokens of a forward / backward; 0: as many as fit
checkpoint_activations = False          # recompute blocks in the backward: a third more compute
# --- evaluation, saving, machine ------------------------------------------------------------------
eval_interval: at_least(0) = 50         # steps; 0 = only at the end
eval_samples: at_least(1) = 4           # per held-out problem, at `temperature`
save_interval: at_least(0) = 50         # steps; the last step is always saved
keep_last: at_least(1) = 2              # checkpoints kept, beside the best by held-out Pass@1
async_save = False                      # save in the background, from a copy in host memory
log_to: one_of("", "wandb", "tensorboard") = ""  # besides metrics.jsonl
device: one_of("auto", "cpu", "cuda") = "auto"
replicas: at_least(1) = 1               # HSDP: shard within world_size / replicas ranks (a node)
offload = False                         # keep shards of weights and moments in host memory
timeout_minutes: above(0) = 60.0        # a collective that waits longer ends the job
dtype: one_of("float32", "bfloat16") = "float32"  # to compute in; weights and moments stay fp32
compile = False                         # torch.compile the blocks: a minute at start
threads: at_least(0) = 0                # CPU threads; 0 = torch's choice


def check_config(c: SimpleNamespace) -> None:
    """Reject knobs that would later fail or silently prevent learning; errors: value, rule, fix."""
    if c.w_min > c.w_max:
        raise ValueError(f"w_min = {c.w_min} exceeds w_max = {c.w_max}: Eq. 7 clips weights into "
                         "[w_min, w_max]; swap them")
    if c.method in ("tapo", "sft") and c.n_pos + c.n_neg > c.samples_per_prompt:
        raise ValueError(f"n_pos + n_neg = {c.n_pos} + {c.n_neg} exceeds samples_per_prompt = "
                         f"{c.samples_per_prompt}: no group could ever be eligible (Eq. 3); lower "
                         "them or sample more")
    for key in ("init_from", "problems"):
        if not getattr(c, key):
            raise ValueError(f"{key} is not set; pass --{key}=PATH or a config file such as "
                             "config/toy.py")


def loss_of(batch, *, model, ref_model, method: str, temperature: float, clip_eps: float,
            weighting: str, w_min: float, w_max: float, kl_coef: float, log_kl: bool,
            opsd_loss: str, opsd_beta: float, opsd_clip: float,
            on_policy: bool) -> tuple[torch.Tensor, dict]:
    """The loss of one micro-batch (Eq. 2, 6, 8 for GRPO and TAPO) and the sums of train/* logs;
    stores log-probs and weights of constructions on their rows, for the logs.

    on_policy: the step has one update, so the old policy is the policy itself (trap 9).
    """
    if method == "opsd":
        logprobs, entropy, teaching = opsd.student_and_teacher(
            model, ref_model, batch, temperature=temperature, loss=opsd_loss, beta=opsd_beta,
            clip=opsd_clip)
    else:
        logprobs, entropy = model(batch.inputs, batch.targets, temperature=temperature)
    ref_logprobs = None
    if log_kl or kl_coef:
        with torch.no_grad():
            ref_logprobs = ref_model(batch.inputs, batch.targets, temperature=temperature)[0]
    old_logprobs = logprobs.detach() if on_policy else batch.old_logprobs
    w = WEIGHTINGS[weighting](logprobs, entropy, w_min, w_max)  # Eq. 7, or another
    weights = torch.where(batch.ots > 0, w, 1.0)
    sums = train_sums(batch, logprobs, entropy, old_logprobs, weights, ref_logprobs)
    if method == "sft":
        loss = nll_loss(logprobs, batch.mask, batch.loss_scale)
    elif method == "opsd" and opsd_loss == "jsd":
        loss = distillation_loss(teaching, batch.mask, batch.loss_scale)
    else:
        # OPSD on the sampled token: the advantage is log(p_teacher / p_student) of that token
        advantage = (teaching - logprobs.detach() if method == "opsd"
                     else batch.advantages[:, None])
        loss, stats = policy_loss(logprobs, old_logprobs, advantage, batch.mask, weights,
                                  batch.loss_scale, clip_eps)
        add_up(sums, {"train/clip_fraction": stats["clipped"],
                      "train/clip_fraction#": batch.mask.sum(),
                      "train/ratio_max": stats["ratio_max"]})
    if kl_coef:  # the KL estimator is valid only on tokens that the policy itself sampled
        own = batch.mask * (1 - batch.is_reflection[:, None])
        kl = kl_to_ref(logprobs, ref_logprobs, own)
        loss = loss + kl_coef * (batch.loss_scale[:, None] * kl).sum()
    for b, r in enumerate(batch.rows):
        if r.is_reflection:  # kept as tensors: no host sync
            r.logprobs = logprobs[b, batch.columns_of(b)].detach()
            r.ots_weights = w[b, batch.columns_of(b)]
    return loss, sums


def share_logs(rollouts: list[Rollout]) -> None:
    """All-gather the log-probs and weights that loss_of stored on the rank that trained a row."""
    noted = [(i, r.logprobs.tolist(), r.ots_weights.tolist()) for i, r in enumerate(rollouts)
             if torch.is_tensor(r.logprobs)]
    for i, logprobs, weights in gather(noted):
        rollouts[i].logprobs, rollouts[i].ots_weights = logprobs, weights


def main() -> None:
    """Algorithm 1: the loop over steps, each phase one call."""
    config = configure(globals())
    c = SimpleNamespace(**config)
    check_config(c)
    parallel.check_world(c.replicas, c.prompts_per_step)
    config["problems_mark"] = file_mark(c.problems)  # a resumed run must find the same problems
    first_step, load_from = find_start(config)
    device = parallel.start(c.device, c.timeout_minutes)
    parallel.check_shared(c.out_dir, first_step)
    if c.threads:
        torch.set_num_threads(c.threads)
    out = Path(c.out_dir)
    if rank() == 0:
        print_config(config, out)
        log_also = open_log(c.log_to, config, first_step)

    wrap = functools.partial(parallel.shard, device=device, dtype=c.dtype, replicas=c.replicas,
                             offload=c.offload)
    training = load_problems(c.problems)
    held_out = load_problems(c.eval_problems) if c.eval_problems else []
    tokenizer = load_tokenizer(load_from)
    encode_prompts(tokenizer, training + held_out, c.instruction)
    load = functools.partial(load_hf, device=device, num_tokens=len(tokenizer), wrap=wrap,
                             compile=c.compile)
    model = load(load_from)
    model.checkpoint_activations = c.checkpoint_activations
    context = model.config.max_position_embeddings
    check_prompts_fit(training + held_out, c.max_new_tokens, context)
    stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
    ref_model = None  # frozen copy of init_from, without fp32 masters
    if c.log_kl or c.kl_coef or c.method == "opsd":
        ref_model = load(c.init_from, dtype=getattr(torch, c.dtype),
                         wrap=wrap if world_size() > 1 or c.offload else None).requires_grad_(False)
        check_same_model(load_from, model.config, c.init_from, ref_model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, weight_decay=0.0,
                                  fused=True)
    if first_step:
        load_optimizer(Path(load_from), model, optimizer)
    if rank() == 0:
        save_config(config, out)
        tokenizer.save_pretrained(out / "tokenizer")
        keep_log(out / "metrics.jsonl", first_step)

    unsharded = Unsharded(model, dtype=c.dtype, device=device)
    # max_new_tokens: cap of a response and of y_ref; sampling a synthesis has a cap of its own
    sampling = {"max_new_tokens": c.max_new_tokens, "stop_ids": stop_ids,
                "temperature": c.temperature, "max_rows": c.max_rows, "decoder": Decoder()}
    tokens_per_microbatch = c.tokens_per_microbatch or largest_microbatch(
        model, optimizer, device=device, dtype=c.dtype, reference_model=ref_model is not None,
        full_divergence=c.method == "opsd" and c.opsd_loss == "jsd")
    say(run_table(training, stop_ids, tokenizer, device, c.dtype, tokens_per_microbatch,
                  c.max_steps, c.prompts_per_step))
    on_device = {"tokens_per_microbatch": tokens_per_microbatch, "device": device}
    loss_fn = functools.partial(
        loss_of, model=model, ref_model=ref_model, on_policy=c.updates_per_step == 1,
        **{knob: config[knob] for knob in (
            "method", "temperature", "clip_eps", "weighting", "w_min", "w_max", "kl_coef", "log_kl",
            "opsd_loss", "opsd_beta", "opsd_clip")})
    saver, stop = Saver(tokenizer, config, background=c.async_save), failing.Stop()
    no_memory = functools.partial(failing.out_of_memory_names, c.out_dir)
    dry_steps = lost_steps = bad_steps = 0  # in a row: none eligible, none kept, no update
    done = first_step
    if done == c.max_steps:
        say(f"{load_from} is the last step; nothing to resume")
    for step in range(first_step, c.max_steps):
        clock = Clock()
        queries = problems_for_step(training, c.seed, step, c.prompts_per_step)
        with no_memory(max_rows=c.max_rows), unsharded as sampler:
            # Algorithm 1, lines 1-6: K scored rollouts per query. Each rank samples its own queries
            rollouts = sample_rollouts(
                sampler, tokenizer, queries[rank()::world_size()], c.samples_per_prompt,
                key=(c.seed, ROLLOUT, step), progress=f"step {step + 1} rollouts", **sampling)
            sums = {"time/generate": clock.lap()}
            score(rollouts)
            sums["time/grade"] = clock.lap()
            counts, outcomes = {}, []
            if c.method in ("tapo", "sft"):
                # lines 8-11: pairs (y-, y+) of eligible groups (Eq. 3)
                pairs, counts = reflect.select_pairs(
                    rollouts, n_pos=c.n_pos, n_neg=c.n_neg, m_max=c.m_max,
                    key=(c.seed, PAIRING, step))
                # lines 12-14: a micro-reflective trajectory per pair, scored by the same reward
                outcomes = [construction.outcome for construction in reflect.construct(
                    sampler, tokenizer, pairs, prefix_mode=c.prefix_mode, template=c.template,
                    decoupled=c.decoupled, max_synthesis_tokens=c.max_synthesis_tokens,
                    key=(c.seed, REFLECTION, step), progress=f"step {step + 1} reflections",
                    **sampling)]
                score([r for r in outcomes if isinstance(r, Rollout)])
            sums["time/reflect"] = clock.lap()
        # all-gather: every rank gets all rollouts, in an order independent of the number of ranks
        rollouts = sorted(gather(rollouts), key=lambda r: r.query)
        outcomes, counts = gather(outcomes), reduce_sums(counts)
        reflections = [r for r in outcomes if isinstance(r, Rollout)
                       and reflect.is_kept(r, c.keep)]
        everything = rollouts + sorted(reflections, key=lambda r: r.query)

        # lines 17-19: advantages, normalised within each r.group (Eq. 1, 4, 5)
        set_advantages(everything, ref_advantage=c.ref_advantage)

        # token masks by role; by default the inserted diagnosis contributes no gradient
        for r in reflections:
            r.mask, r.ots = reflect.token_masks(r.roles, diagnosis=c.diagnosis,
                                                train_prefix=c.train_prefix)
        if c.method == "opsd":
            sums |= opsd.set_teachers(tokenizer, rollouts, template=c.template, context=context,
                                      key=(c.seed, PAIRING, step))
        if c.method == "sft":  # trains on correct constructions only
            for r in everything:
                if not r.is_reflection or r.reward <= 0:
                    r.mask = [0.0] * len(r.mask)

        # CRITICAL: one denominator, counted over the whole step before the first backward
        set_loss_scales(everything, lam=c.lam if c.method == "tapo" else 1.0, loss_agg=c.loss_agg,
                        loss_norm=c.loss_norm)
        # Rollouts with advantage 0 (zero-variance groups) count in the denominator but skip the
        # update: their gradient is 0. train/* omits them. Reflections stay, for Fig. 3's logs.
        needs_advantage = c.method in ("tapo", "grpo") and not c.kl_coef
        learning = [r for r in everything if sum(r.mask)
                    and (r.advantage or r.is_reflection or not needs_advantage)]

        # lines 21-22: L_orig + lam * L_ref (Eq. 6; lam is in loss_scale), one update
        rate = set_learning_rate(optimizer, step, learning_rate=c.learning_rate,
                                 warmup_steps=c.warmup_steps, max_steps=c.max_steps)
        clock.lap()
        with no_memory(tokens_per_microbatch=tokens_per_microbatch, offload=c.offload,
                       checkpoint_activations=c.checkpoint_activations):
            if c.updates_per_step > 1:
                set_old_logprobs(model, learning, temperature=c.temperature, **on_device)
            for _ in range(c.updates_per_step):
                trained = update(model, optimizer, learning, loss_fn, grad_clip=c.grad_clip,
                                 **on_device)
        share_logs(learning)
        sums |= trained | {"train/lr": rate, "time/update": clock.lap(),
                           "time/step": clock.total()}

        done = step + 1
        sums |= rollout_sums(rollouts)
        if counts:
            sums |= reflect_sums(counts, outcomes, len(reflections))
        metrics = means(sums)
        metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/generate"]
        if held_out and (done == c.max_steps or (c.eval_interval and done % c.eval_interval == 0)):
            with no_memory(max_rows=c.max_rows), unsharded as sampler:
                metrics |= evaluate(sampler, tokenizer, held_out, c.eval_samples, seed=c.seed,
                                    **sampling)
            say(f"step {done:4d}/{c.max_steps} | held-out pass@1 {metrics['eval/pass1']:.3f}")
        if rank() == 0:
            jsonl.write(out / "rollouts" / f"step_{done:06d}.jsonl",
                        [r.to_row(done, tokenizer) for r in everything])
            with open(out / "metrics.jsonl", "a") as log:
                log.write(json.dumps({"step": done} | metrics) + "\n")
            log_also(done, metrics)
        say(console_line(done, c.max_steps, metrics))
        dry_steps = 0 if counts.get("eligible") else dry_steps + 1
        if metrics.get("reflect/candidates"):
            lost_steps = 0 if metrics["reflect/kept"] else lost_steps + 1
        for warning in warnings_of(metrics, method=c.method, max_new_tokens=c.max_new_tokens,
                                   dry_steps=dry_steps, lost_steps=lost_steps):
            say(f"WARNING: {warning}")
        bad_steps = bad_steps + 1 if metrics["train/skipped"] else 0
        failing.check_bad_steps(bad_steps, c.out_dir)
        stopped_by = max(gather([stop.signal]))  # a signal to one rank stops all ranks
        if stopped_by or done == c.max_steps or (c.save_interval and done % c.save_interval == 0):
            saver.save(out / f"step_{done:06d}", model, optimizer, done, metrics.get("eval/pass1"))
        saver.check()
        if stopped_by:
            break
    saver.wait()
    if done < c.max_steps:
        failing.end_after_signal(stopped_by, done, c.max_steps, out)


class Clock:
    """Seconds since the last lap, and since the start."""

    def __init__(self):
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def total(self) -> float:
        return self.last - self.start


def run_table(training, stop_ids, tokenizer, device, dtype, tokens_per_microbatch, max_steps,
              prompts_per_step) -> str:
    """Summary of the run, printed once at start."""
    lengths = sorted(len(p.prompt_ids) for p in training)
    stops = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)}" for i in stop_ids)
    return "\n".join([
        f"processes   {world_size()} on {device}, compute in {dtype}, micro-batches of "
        f"{tokens_per_microbatch:,} tokens",
        f"problems    {len(training):,}, prompts of {lengths[0]} to {lengths[-1]} tokens; "
        f"{max_steps} steps are {max_steps * prompts_per_step / len(training):.2f} epochs",
        f"stop ids    {stops}"])


if __name__ == "__main__":
    failing.run(main)
