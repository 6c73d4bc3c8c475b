"""Rows to ids: formats, end tokens, and errors that name row and column."""

import json

import pytest
import torch
from datasets import Dataset

from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.data import collate, load_rows, tokenize
from retort.distill.encoding import Encoding, end_tokens, until_eos
from retort.distill.losses import IGNORED
from retort.errors import ConfigurationError
from tests.distill.toys import llama, tokenizer, trainer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>!{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoding(**changes):
    made = tokenizer()
    made.chat_template = TEMPLATE
    values = {"tokenizer": made, "eos_ids": (made.eos_token_id,), "max_length": 64}
    return Encoding(**{**values, **changes})


def texts(rows, **changes):
    """(prompt, completion) of each row, decoded with special tokens."""
    how = encoding(**changes)
    decode = how.tokenizer.decode
    return [(decode(r["prompt_ids"]), decode(r["completion_ids"])) for r in tokenize(rows, how)]


def write(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_text_columns_end_with_the_end_token():
    assert texts([{"prompt": "Hi", "completion": " you"}]) == [("Hi", " you<eos>")]


def test_references_count_by_their_first():
    rows = [{"prompt": "a", "reference": "b"}, {"prompt": "c", "reference": "d"}]
    assert texts(rows) == [("a", "b<eos>"), ("c", "d<eos>")]
    assert texts(Dataset.from_list([{"prompt": "a", "reference": ["x", "y"]}])) == [("a", "x<eos>")]


def test_messages_and_chat_prompts_go_through_the_template_and_end_at_its_first_end_token():
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    expected = [("[user]Q[assistant]", "A<eos>")]
    assert texts([{"messages": [user, answer]}]) == expected
    assert texts([{"prompt": [user], "completion": [answer]}]) == expected
    assert texts([{"prompt": [user], "completion": "A"}]) == expected
    assert texts([{"prompt": "Q", "completion": "A"}], as_chat=True) == expected


def test_a_conversation_keeps_earlier_turns_in_the_prompt():
    said = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in said]}]
    assert texts(rows) == [("[user]1[assistant]2<eos>![user]3[assistant]", "4<eos>")]


def test_prompts_alone_are_enough_where_no_completion_is_read():
    assert texts([{"prompt": "Hi"}], completion=False) == [("Hi", "")]


def test_a_long_completion_loses_its_end_and_its_end_token():
    ((prompt, completion),) = texts([{"prompt": "abc", "completion": "0123456789"}], max_length=8)
    assert (prompt, completion) == ("abc", "01234")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], "columns"),
        ([{"prompt": "x"}], "'completion'"),
        ([], "is empty"),
        (
            [{"prompt": "x", "completion": "y"}, {"prompt": "", "completion": "y"}],
            "row 2: column 'prompt'",
        ),
        ([{"prompt": "x", "completion": "  "}], "row 1: column 'completion' is empty"),
        ([{"prompt": "x", "reference": None}], "row 1: column 'reference' is empty"),
        ([{"prompt": "x" * 64, "completion": "y"}], "row 1: the prompt has 64 tokens"),
        ([{"prompt": "x" * 10**6, "completion": "y"}], "row 1: the prompt has 1000000 tokens"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "row 1: column 'messages' must end"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "x"},
                        {"role": "assistant", "content": ""},
                    ]
                }
            ],
            "row 1: column 'messages' is empty",
        ),
    ],
)
def test_bad_rows_are_named_in_one_line(rows, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        tokenize(rows, encoding(origin="data"))
    assert "\n" not in str(caught.value)


def test_rows_with_long_prompts_are_left_out_on_request(caplog):
    rows = [
        {"prompt": "x", "completion": "y"},
        {"prompt": "x" * 64, "completion": "y"},
        {"prompt": "z", "completion": "y"},
    ]
    made = tokenize(rows, encoding(skip_long_prompts=True))
    assert made["index"][:] == [0, 2] and "1 of 3 rows left out" in caplog.text
    with pytest.raises(ConfigurationError, match="every prompt is longer"):
        tokenize(rows[1:2], encoding(skip_long_prompts=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": 1}'], "row 2: column 'prompt' must be"),
        (['{"prompt": "a", "completion": ["b", 1]}'], "row 1: column 'completion' must be"),
        (
            ['{"prompt": "a"}', '{"prompt": [{"role": "user", "content": "b"}]}'],
            "row 2: column 'prompt' is text in some rows",
        ),
    ],
)
def test_jsonl_columns_hold_one_kind_of_value(tmp_path, rows, message):
    with pytest.raises(ConfigurationError, match=message):
        load_rows(write(tmp_path / "x.jsonl", *(row + "\n" for row in rows)))


def test_jsonl_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"x\.jsonl is not UTF-8"):
        load_rows(str(path))


def test_chat_without_a_template_says_so():
    with pytest.raises(ConfigurationError, match="chat template"):
        tokenize(
            [{"prompt": "x", "completion": "y"}], encoding(tokenizer=tokenizer(), as_chat=True)
        )


def test_jsonl_reads_mixed_rows_and_ignores_other_columns(tmp_path):
    rows = [{"prompt": "a", "reference": "b", "id": 1}, {"prompt": "c", "reference": ["d", "e"]}]
    loaded = load_rows(write(tmp_path / "x.jsonl", *rows))
    assert loaded.column_names == ["prompt", "reference"]
    assert loaded["reference"][:] == ["b", "d"]


def test_parquet_and_folders_go_through_datasets(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    rows.to_parquet(str(tmp_path / "train.parquet"))
    assert load_rows(str(tmp_path / "train.parquet"))[0] == {"prompt": "a", "completion": "b"}
    assert load_rows(str(tmp_path))["prompt"][:] == ["a"]
    rows.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(str(tmp_path / "saved"))["completion"][:] == ["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "row 2: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', "row 2: expected an object"),
        ('{"question": "a"}\n', r"columns \['question'\]"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_rows(str(path))
    assert "bad.jsonl" in str(caught.value)


def test_missing_data_is_an_error_of_one_line(tmp_path):
    for name in (str(tmp_path / "no.jsonl"), str(tmp_path / "no.parquet"), str(tmp_path)):
        with pytest.raises(ConfigurationError) as caught:
            load_rows(name)
        assert "\n" not in str(caught.value)


def test_end_tokens_are_the_tokenizers_and_the_models():
    made, model = tokenizer(), llama()
    model.generation_config.eos_token_id = [7, made.eos_token_id]
    assert end_tokens(made, model) == (made.eos_token_id, 7)
    made.eos_token = None
    with pytest.raises(ConfigurationError, match="eos_token"):
        end_tokens(made)


def test_until_eos_keeps_the_first_end_token():
    assert until_eos([5, 6, 2, 7, 2], [2]) == [5, 6, 2]
    assert until_eos([5, 6], [2]) == [5, 6]


def test_targets_hold_the_end_token_even_where_it_is_the_padding():
    """pad == eos == 0: `id != pad` would never teach the student to stop."""
    sequences = [
        TrainingSequence([4, 5], [6, 0], supervised=True, distilled=False),
        TrainingSequence([7], [8, 9, 8, 0], supervised=False, distilled=True),
    ]
    batch = build_batch(sequences, pad_id=0, tagger=lambda ids: list(range(len(ids))))
    i = IGNORED
    assert batch["input_ids"].tolist() == [[4, 5, 6, 0, 0], [7, 8, 9, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["targets"].tolist() == [[i, 6, 0, i, i], [8, 9, 8, 0, i]]
    assert batch["span_ids"].tolist() == [[-1] * 5, [0, 1, 2, 3, -1]]
    assert stream_mask(batch, "supervised").sum() == 2
    assert stream_mask(batch, "distilled").sum() == 4


def test_the_collator_hands_on_examples():
    (example,) = collate([{"index": 3, "prompt_ids": [1], "completion_ids": [2]}])["examples"]
    assert (example.index, example.prompt_ids, example.completion_ids) == (3, [1], [2])


def test_real_rows_and_the_real_tokenizer_learn_to_stop(data, zoo_tokenizer):
    rows = load_rows(str(data / "dolly_valid.jsonl")).select(range(20))
    ends = end_tokens(zoo_tokenizer)
    how = Encoding(zoo_tokenizer, ends, max_length=1024, as_chat=True)
    for row, source in zip(tokenize(rows, how), rows, strict=True):
        assert row["completion_ids"][-1] in ends
        assert zoo_tokenizer.decode(row["completion_ids"][:-1]) == source["reference"]
        batch = build_batch(
            [TrainingSequence(row["prompt_ids"], row["completion_ids"], True, False)],
            zoo_tokenizer.pad_token_id,
        )
        assert torch.equal(
            batch["targets"][batch["targets"] != IGNORED], torch.tensor(row["completion_ids"])
        )


def test_whole_texts_are_learned_from_their_second_token_on(tmp_path):
    made = trainer(tmp_path, method="sft", rows=[{"text": "hello you"}, {"text": "x"}])
    tokens, end = made.tokens, made.end_tokens[0]
    for row, text in zip(made.train_dataset, ("hello you", "x"), strict=True):
        whole = [*tokens(text)["input_ids"], end]
        assert (row["prompt_ids"], row["completion_ids"]) == (whole[:1], whole[1:])


def test_whole_texts_are_cut_and_empty_ones_named(tmp_path):
    made = trainer(tmp_path, method="kd", rows=[{"text": "hello you" * 9}], max_length=5)
    (row,) = made.train_dataset
    assert len(row["prompt_ids"]) + len(row["completion_ids"]) == 5
    with pytest.raises(ConfigurationError, match="row 2: column 'text' is empty"):
        trainer(tmp_path, method="kd", rows=[{"text": "hello"}, {"text": " "}])


@pytest.mark.parametrize("method", ["mgsr", "gkd", "seqkd"])
def test_whole_texts_have_nothing_to_write_after(tmp_path, method):
    with pytest.raises(ConfigurationError, match="rows of 'text'") as caught:
        trainer(tmp_path, method=method, rows=[{"text": "hello"}])
    assert "\n" not in str(caught.value)


def test_the_prompt_is_learned_where_it_is_asked_for(tmp_path):
    plain, whole = (
        trainer(tmp_path, method="kd", completion_only_loss=only).train_dataset
        for only in (True, False)
    )
    for a, b in zip(plain, whole, strict=True):
        assert b["prompt_ids"] == a["prompt_ids"][:1]
        assert b["completion_ids"] == a["prompt_ids"][1:] + a["completion_ids"]
    with pytest.raises(ConfigurationError, match="completion_only_loss"):
        trainer(tmp_path, method="gkd", completion_only_loss=False)


def test_several_processes_tokenise_alike(tmp_path):
    one, two = (
        trainer(tmp_path, method="sft", dataset_num_proc=n).train_dataset for n in (None, 2)
    )
    assert one[:] == two[:]


def test_a_text_with_end_tokens_inside_is_learned_to_its_end(tmp_path):
    """As chats that a template has written already, or documents one after the other."""
    chat = "Hi<eos>you<eos>and so on"
    rows = [{"text": chat}, {"text": f"{chat}<eos>"}]
    assert texts(rows) == [("H", f"{chat[1:]}<eos>")] * 2


def test_a_row_of_text_among_prompts_is_not_written_after(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"text": "hello"}]
    assert len(trainer(tmp_path, method="kd", rows=rows).train_dataset) == 2
    with pytest.raises(ConfigurationError, match="row 2: column 'prompt' is empty"):
        trainer(tmp_path, method="mgsr", rows=rows)


def test_a_byte_order_mark_and_dos_line_ends_are_read(tmp_path):
    (tmp_path / "dos.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert load_rows(str(tmp_path / "dos.jsonl"))[:] == {"prompt": ["a"], "completion": ["b"]}


USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', "key 'prompt' twice"),
        (r'{"prompt": "a\ud800", "completion": "b"}', "a lone surrogate is no Unicode text"),
        ('{"prompt": ' + "[" * 100_000, "not valid JSON"),
    ],
)
def test_rows_that_other_readers_would_change_are_named(tmp_path, row, said):
    path = write(tmp_path / "r.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(ConfigurationError, match=f"r.jsonl, row 2: .*{said}"):
        load_rows(path)


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    path = write(tmp_path / "r.jsonl", r'{"prompt": "\ud83d\ude00", "completion": "b"}')
    assert load_rows(path)["prompt"][0] == "\U0001f600"


def test_messages_of_unlike_parts_are_named(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    path = write(tmp_path / "r.jsonl", {"messages": [USER, ANSWER]}, {"messages": [parts, ANSWER]})
    with pytest.raises(ConfigurationError, match="row 2: 'content' in column 'messages'"):
        load_rows(path)


def test_answers_behind_the_first_are_not_dropped_in_silence():
    rows = [{"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}]
    with pytest.raises(ConfigurationError, match="row 1: column 'completion' has 3 messages"):
        texts(rows)
    assert texts([{"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}])[0][1] == "A<eos>"


def test_rows_in_python_may_have_their_columns_where_they_like():
    rows = [{"prompt": "a", "reference": ["b", "x"]}, {"prompt": "c", "completion": "d"}]
    assert texts(rows) == [("a", "b<eos>"), ("c", "d<eos>")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"train": [{"prompt": "a"}]}, r"train_dataset is \['train'\]: give one"),
        ((row for row in [{"prompt": "a"}]), "train_dataset is a stream"),
        (["a"], "train_dataset: expected rows with named columns, got 'a'"),
        ([{"prompt": "a\ud800", "completion": "b"}], "train_dataset: the rows make no table"),
    ],
)
def test_what_are_no_rows_is_said(tmp_path, rows, said):
    with pytest.raises(ConfigurationError, match=said):
        trainer(tmp_path, method="kd", rows=rows)
