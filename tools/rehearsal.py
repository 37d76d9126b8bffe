"""Helpers of runs/rehearsal.sh: make a tiny Qwen3 with training examples ("lessons"), and check the
finished runs.

    python -m tools.rehearsal make TOKENIZER PROBLEMS OUT  # OUT/{tiny,lessons.jsonl,problems.jsonl}
    python -m tools.rehearsal check OUT RUN [RUN ...]      # verify OUT/RUN against transformers

TOKENIZER is a folder with Qwen3's tokenizer files. The lessons are templates around the known
answer; the questions, the answers' LaTeX, the tokenizer and the chat template are real. The lessons
teach the format, not mathematics.
"""
import json
import re
import sys
from pathlib import Path

import torch

import answers
import jsonl
import reflect
import reward
from checkpoint import checkpoints
from data import Problem, load_problems, load_tokenizer, save_problems
from hf import load_hf, save_hf
from metrics import PARITY_ALARM
from model import CausalLM, ModelConfig

N_PROBLEMS = 24
MAX_QUESTION = 24  # tokens


def response(answer: str) -> str:
    return (f"Let us go through it step by step.\nThe value comes to ${answer}$.\n\n"
            f"So the final answer is \\boxed{{{answer}}}.")


def synthesis(slip: str, answer: str) -> str:
    """The ideal synthesis for the wrong response whose answer is `slip`."""
    copied = response(slip).partition("\n\n")[0]
    return (f"<analysis>Location: \"comes to ${slip}$\". Type: arithmetic slip, the value is "
            f"${answer}$.</analysis>\n<reconstruction>{copied}\n<reflection>Wait, ${slip}$ is "
            f"not right, I slipped in the last step.</reflection>\n"
            f"It should be ${answer}$.\n\nSo the final answer is "
            f"\\boxed{{{answer}}}.</reconstruction>")


def synthesis_request(question: str, wrong: str, right: str) -> str:
    """User turn of the synthesis prompt, as reflect.synthesis_prompt renders it."""
    text = reflect.TEMPLATES["long"]["micro"]
    for field, value in (("question", question), ("wrong", wrong), ("right", right)):
        text = text.replace("{" + field + "}", value)
    return text


def lessons_for(p: Problem) -> list[dict] | None:
    """Examples for coldstart.py: a right and a wrong solution, so that the model learns to give
    both about equally often, and their synthesis. None if changing the answer's last digit does
    not give a wrong answer, e.g. without a digit."""
    # change the last digit
    slip = re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 3) % 10), p.answer, count=1)
    right, wrong = response(p.answer), response(slip)
    if [g.status for g in reward.grade_many([right, wrong], [p.answer] * 2)] != ["correct",
            "wrong"]:
        return None
    asked = synthesis_request(p.question, wrong, right)
    return [{"question": p.question, "solution": right},
            {"question": p.question, "solution": wrong},
            {"prompt": asked, "completion": synthesis(slip, p.answer)}]


def make(tokenizer_folder: str, problems: str, out: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    model = CausalLM(ModelConfig(  # a scaled-down Qwen3 with the full vocabulary
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
        eos_token_id=tokenizer.eos_token_id))
    # as Qwen3 ships it: a second stop id, and sampling defaults that neither training nor
    # evaluation may pick up
    save_hf(model, tokenizer, out / "tiny", generation_config={
        "eos_token_id": stops, "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    found, lessons = [], []
    for p in load_problems(problems):
        short = len(tokenizer(p.question)["input_ids"]) <= MAX_QUESTION
        if len(found) < N_PROBLEMS and short and (rows := lessons_for(p)):
            found.append(p)
            lessons += rows
    save_problems(found, out / "problems.jsonl")
    jsonl.write(out / "lessons.jsonl", lessons)
    print(f"{out}: a model of {len(tokenizer):,} tokens, {len(found)} problems, {len(lessons)} "
          "lessons")


@torch.no_grad()
def check(out: Path, names: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for run in (out / name for name in names):
        config, last = json.loads((run / "config.json").read_text()), checkpoints(run)[-1]
        files = sorted((run / "rollouts").glob("step_*.jsonl"))
        rows = [row for file in files for row in jsonl.read(file)]
        tokenizer = load_tokenizer(last)
        stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
        sampled = [r for r in rows if not r["is_reflection"]]
        for r in rows:
            ids = r["completion_ids"]
            assert (ids[-1] in stops) == r["finished"] and stops.isdisjoint(ids[:-1]), r["uid"]
            assert tokenizer.decode(ids[:-1] if r["finished"] else ids) == r["text"], r["uid"]
            assert tokenizer.decode(r["prompt_ids"]) == r["prompt"] and max(ids) < len(tokenizer)
            settled = answers.normalise(r["answer"] or "") == answers.normalise(r["gold"])
            assert settled <= (r["reward"] == 1.0) or not r["finished"], r["uid"]
            # the preserved prefix equals, id by id, that of a wrong response of the same group
            if r["is_reflection"]:
                n = r["roles"].count(0)
                assert any(s["completion_ids"][:n - 1] == ids[:n - 1] for s in sampled
                           if s["query"] == r["query"] and not s["reward"]), r["uid"]

        theirs = AutoModelForCausalLM.from_pretrained(config["init_from"],
            dtype=torch.float32).eval()
        gaps = []
        # the first step was sampled from init_from
        for r in [r for r in sampled if r["step"] == 1][:8]:
            n = len(r["completion_ids"])
            logits = theirs(torch.tensor([r["prompt_ids"] + r["completion_ids"]])).logits[0,
                -n - 1:-1, :len(tokenizer)]
            logprobs = (logits.double() / config["temperature"]).log_softmax(-1)
            logprobs = logprobs.gather(1, torch.tensor(r["completion_ids"])[:, None])[:, 0]
            gaps.append((logprobs - torch.tensor(r["sample_logprobs"])).abs())
        gaps, exact = torch.cat(gaps), config["dtype"] == "float32"
        gap = float(gaps.max() if exact else gaps.mean())
        assert gap < (1e-4 if exact else PARITY_ALARM), gap
        render = AutoTokenizer.from_pretrained(last).apply_chat_template
        flags = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        for r in sampled[:32]:
            assert r["prompt_ids"] == render(
                [{"role": "user", "content": r["question"] + config["instruction"]}], **flags)

        theirs, ours = AutoModelForCausalLM.from_pretrained(last,
            dtype=torch.float32).eval(), load_hf(last).eval()
        ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["completion_ids"]])
        difference = float((theirs(ids).logits[0] - ours(ids)[0] @
                            ours.output_weight.T).abs().max())
        assert difference < 1e-4, difference
        print(f"{run}: {len(rows)} rollouts read as sampled ({len(rows) - len(sampled)} "
              "constructions); prompts are those of "
              f"transformers, log-probs within {gap:.1e}{'' if exact else ' on average'}, "
              f"logits of {last.name} within {difference:.1e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"] and len(sys.argv) == 5:
        make(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    elif sys.argv[1:2] == ["check"] and len(sys.argv) > 3:
        check(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(__doc__)
