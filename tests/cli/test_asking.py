"""`uft generate` and `uft chat`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft.cli import chat, main
from uft.cli.chat import Conversation


def greedy(folder, prompt, n):
    """What plain transformers writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_writes_what_transformers_writes(workplace, capsys):
    words = ["generate", "--model", "tiny", "--max_new_tokens", "6"]
    assert main([*words, "pairs.parquet", "--limit", "3", "--output", "answers.jsonl"]) == 0
    rows = lines(workplace / "answers.jsonl")
    assert [row["prompt"] for row in rows] == ["say:", "say a b c:", "hello:"]
    assert [row["response"] for row in rows] == [greedy("tiny", row["prompt"], 6) for row in rows]
    assert main([*words, "--prompt", "say:"]) == 0
    assert capsys.readouterr().out == f"> say:\n{rows[0]['response'].strip()}\n"


def test_models_side_by_side(workplace):
    words = ["generate", "--model", "tiny", "--model", "tiny", "--prompt", "say:", "--chat", "--temperature", "1"]
    assert main([*words, "--seed", "3", "--max_new_tokens", "4", "--output", "a.jsonl"]) == 0
    first, second = lines(workplace / "a.jsonl")
    assert first == second and first["prompt"] == [{"role": "user", "content": "say:"}]  # the same luck


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "want prompts: either a FILE, or --prompt TEXT"),
        (["pairs.parquet", "--prompt", "x"], "want prompts"),
        (["lost.jsonl"], "lost.jsonl"),
        (["--prompt", "say:", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "say:", "--output", "recipe.yaml"], "recipe.yaml: exists already"),
        (["--prompt", "say:", "--device", "nowhere"], "device is 'nowhere'"),
    ],
)
def test_what_generate_refuses(words, message, workplace, capsys):
    assert main(["generate", "--model", "tiny", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def talk(answers=None, **options):
    seen = []

    def answer(messages, tries):
        seen.append((messages, tries))
        return f"answer {len(seen)}"

    return Conversation(answers or answer, **options), seen


def test_a_conversation_remembers():
    conversation, seen = talk(system="be brief")
    assert conversation.says("one") == "" and conversation.says("two") == ""
    assert [m["content"] for m in seen[1][0]] == ["be brief", "one", "answer 1", "two"]
    assert conversation.says("/again") == ""
    assert seen[2] == (seen[1][0], 1)  # the same messages, other luck
    conversation.says("/undo")
    assert [m["content"] for m in conversation.messages] == ["be brief", "one", "answer 1"]
    conversation.says("/system be long")
    assert conversation.messages == [{"role": "system", "content": "be long"}]
    assert "/reset" in conversation.says("/what") and conversation.says("/exit") is None
    assert conversation.says("/again") == "(nothing was asked yet)" and conversation.says("   ") == ""


def test_an_answer_that_is_broken_off_leaves_no_trace():
    def broken(messages, tries):
        raise KeyboardInterrupt

    conversation, _ = talk(broken)
    with pytest.raises(KeyboardInterrupt):
        conversation.says("one")
    assert conversation.messages == []


def test_a_conversation_is_saved_as_a_demonstration(tmp_path):
    conversation, _ = talk()
    path = tmp_path / "saved.jsonl"
    assert "want" in conversation.says(f"/save {path}") and "want" in conversation.says("/save")
    conversation.says("one")
    assert "appended" in conversation.says(f"/save {path}")
    assert main(["data", "check", str(path), "--quick"]) == 0  # readable as training data
    assert lines(path)[0]["messages"][1] == {"role": "assistant", "content": "answer 1"}
    assert "Errno" in conversation.says(f"/save {tmp_path}")


def test_chat_reads_until_the_end(workplace, monkeypatch, capsys):
    typed = iter(["hello", "<|im_end|>", "a " * 3000])

    def read(prompt):
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--model", "tiny", "--max_new_tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "special token in text" in out and "/reset begins anew" in out
    template = AutoTokenizer.from_pretrained("tiny")
    prompt = template.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert greedy("tiny", prompt, 5).strip() in out


def test_chat_refuses_numbers_that_mean_nothing(workplace, capsys):
    assert main(["chat", "--model", "tiny", "--max_new_tokens", "0"]) == 1
    assert "max_new_tokens is 0" in capsys.readouterr().err
    assert chat.parser().parse_args(["--model", "x"]).temperature == 0
