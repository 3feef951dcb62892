"""Filters on the form of an answer, on its language, and on offensive words."""

import hashlib
import json

import pytest
from samples import said

from gemma2.core.errors import UsageError
from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.filters.criteria.form import empty, length, repeated_share, repetition, truncated
from gemma2.posttrain.filters.criteria.language import check_codes, language
from gemma2.posttrain.filters.criteria.sample import Sample, sample_of, words_of
from gemma2.posttrain.filters.criteria.unsafe import unsafe
from gemma2.posttrain.schemas import FilterConfig

# --- words ------------------------------------------------------------------------------------------------------------


def test_words_are_letters_and_digits_without_case_and_signs():
    assert words_of("Don't PANIC: 42, x_1!") == ["don't", "panic", "42", "x", "1"]
    assert words_of("Straße im Café, l’été") == ["strasse", "im", "café", "l’été"]


def test_in_scripts_without_spaces_every_character_is_a_word():
    assert words_of("你好 world ไทย") == ["你", "好", "world", "ไ", "ท", "ย"]


# --- empty ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([(False, "Hi"), (True, "")], "an empty answer"),
        ([(False, "Hi"), (True, " \n\t")], "an empty answer"),
        ([(False, "Hi"), (True, "\u00a0\u3000")], "an empty answer"),
        ([(False, "Hi"), (True, "Yes."), (False, "More"), (True, "")], "an empty answer"),
        ([(False, ""), (True, "Yes.")], "no prompt"),
        ([(False, " "), (False, "\n"), (True, "Yes.")], "no prompt"),
        ([(True, "Yes.")], "no prompt"),
        ([(False, "Hi")], "no answer"),
        ([(False, "Hi"), (True, "."), (True, "")], "an empty answer"),
        ([], "no prompt"),
        ([(False, "Hi"), (True, "0")], None),
        ([(False, "?"), (True, ".")], None),
        ([(False, "Hi"), (True, "\u200bA")], None),
        ([(False, "system text"), (False, "Hi"), (True, "Yes")], None),
        ([(False, ""), (False, "Hi"), (True, "Yes")], None),
        ([(False, "2+2"), (True, "4")], None),
        ([(False, "你好"), (True, "好")], None),
        ([(False, "Hi"), (True, "Hello"), (False, "")], None),
        ([(False, "Hi"), (True, "\n\nYes")], None),
        ([(False, "Hi"), (True, "🙂")], None),
    ],
)
def test_empty_prompts_and_answers_are_found(turns, found):
    assert empty(Sample(turns)) == found


@pytest.mark.parametrize("prompt", ["", "  \n", [{"role": "user", "content": " "}]])
def test_an_empty_prompt_is_a_reason_to_drop_not_a_bad_row(prompt):
    sample = sample_of(Row("f:1", {"prompt": prompt, "completion": "Yes."}))
    assert empty(sample) == "no prompt"


# --- truncated --------------------------------------------------------------------------------------------------------

CLOSED = [
    "Yes.",
    "No!",
    "Why?",
    'He said "yes."',
    "(done)",
    "`x = 1`",
    "```py\nx\n```",
    "Ja…",
    "好。",
    "Fine 🙂",
    "**Bold.**",
    "end. \n",
    "| a | b |",
    "$x^2$",
    "<p>x</p>",
]
CUT = [
    "The answer is",
    "Steps:\n1. Open the",
    "It is 42",
    "one, two,",
    "first;",
    "as follows:",
    "中文",
    "and -",
    "def f(x",
    "the “open",
    "a/b",
]


@pytest.mark.parametrize("text", CLOSED)
def test_closing_punctuation_is_an_end(text):
    assert truncated(said(text), require_ending=True) is None


@pytest.mark.parametrize("text", CUT)
def test_an_open_end_is_truncated_only_where_an_ending_is_required(text):
    assert truncated(said(text), require_ending=True) == "no closing punctuation"
    assert truncated(said(text), require_ending=False) is None


@pytest.mark.parametrize(("reason", "found"), [("length", "finish_reason is length"), ("stop", None), (None, None)])
def test_finish_reason_length_is_truncated(reason, found):
    columns = {"prompt": "Hi", "completion": "Yes.", "finish_reason": reason}
    assert truncated(sample_of(Row("f:1", columns)), require_ending=False) == found
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    columns = {"messages": messages, "finish_reason": reason}
    assert truncated(sample_of(Row("f:1", columns)), require_ending=False) == found


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "text", "found"),
    [
        ({"min_words": 2}, "one", "1 words, fewer than 2"),
        ({"min_words": 2}, "one two", None),
        ({"min_words": 1}, "...", "0 words, fewer than 1"),
        ({"max_words": 2}, "one two three", "3 words, more than 2"),
        ({"max_words": 3}, "one two three", None),
        ({"min_chars": 4}, "abc", "3 chars, fewer than 4"),
        ({"min_chars": 3}, "abc", None),
        ({"max_chars": 2}, "abc", "3 chars, more than 2"),
        ({"max_chars": 3}, "abc", None),
        ({"min_words": 1, "max_words": 2, "max_chars": 5}, "a b", None),
        ({"min_words": 1, "max_words": 2, "max_chars": 5}, "abcdef", "6 chars, more than 5"),
        ({"max_words": 2}, "中文字", "3 words, more than 2"),
    ],
)
def test_length_counts_words_and_characters_of_the_model(limits, text, found):
    assert length(said(text, "a prompt that is much longer than this"), FilterConfig(data="d", **limits)) == found


def test_bounds_out_of_order_are_refused():
    with pytest.raises(ValueError, match="min_words 3 is above max_words 2"):
        FilterConfig(data="d", min_words=3, max_words=2)


# --- repetition -------------------------------------------------------------------------------------------------------


def test_the_share_of_repeated_ngrams_by_hand():
    # 33 words give 30 4-grams; a period of 3 has 3 different ones.
    assert repeated_share(["a", "b", "c"] * 11, 4) == pytest.approx(1 - 3 / 30)
    assert repeated_share([str(i) for i in range(33)], 4) == 0
    assert repeated_share(["a"] * 26, 4) == 0  # 23 4-grams are too few


PROSE = " ".join(f"word{i}" for i in range(60))


@pytest.mark.parametrize(
    "text",
    [
        "I am sure. " * 30,
        PROSE + " and so on" * 60,
        "the the " * 40,
        "ha" * 100,
        "a" * 500,
        "。" * 300,
        "-" * 400,
        "A: yes\nB: no\n" * 30,
        "好的" * 60,
        "1 2 3 4 " * 30,
        "0.3333333 " * 60,
        "#### 12\n" * 60,
        "🙂" * 100,
    ],
)
def test_loops_are_found(text):
    assert repetition(said(text), 0.5) is not None


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "Yes. Yes. Yes.",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "\n".join(f"{i} plus {i} is {2 * i}." for i in range(30)),
        "\n".join(f"| item {i} | {i * 7} |" for i in range(30)),
        "| a | b |\n| --- | --- |\n| 1 | 2 |",
        "https://example.com/" + "".join(chr(97 + i * 7 % 26) + str(i) for i in range(60)),
        "".join("ACGT"[byte % 4] for byte in hashlib.sha512(b"a sequence").digest() + hashlib.sha512(b"b").digest()),
        "x = [0] * 10\n" * 3,
        "\n".join([f"+{'-' * 40}+{'-' * 40}+", f"| {'name':<38} | {'kind':<38} |", f"+{'=' * 40}+{'=' * 40}+"] * 2),
        "```\n+---+\n| x |\n+---+\n```",
        "[" + ",\n".join(["[" + ", ".join("0" * 9) + "]"] * 9) + "]",
        "\n".join([" & ".join("1000000") + r" \\"] * 7),
        "\n".join([f"{place:08x}  " + "00 " * 16 + " |................|" for place in range(0, 160, 16)]),
        "unsigned char buffer[] = {" + ", ".join(["0x00"] * 60) + "};",
        "!!!",
    ],
)
def test_lists_tables_and_short_texts_are_not_loops(text):
    assert repetition(said(text), 0.5) is None


def test_turns_are_judged_one_by_one():
    turns = [(False, "Again?"), (True, PROSE)] * 3
    assert repetition(Sample(turns), 0.5) is None


# --- language ---------------------------------------------------------------------------------------------------------

ENGLISH_OR_UNCLEAR = [
    "I am not sure about that, but it may be in the north.",
    "The sum is 7.",
    "Yes.",
    "Paris",
    "2 + 2 = 4",
    "42",
    "Ja.",
    'print("hi")',
    '<a href="https://anaconda.com/"><img src="https://camo.githubusercontent.com/b8555ef2222598ed37ce38ac"></a>',
    "def f(x):\n    return x**2\n",
    "Ilsa lives in Brenn.",
    "OK!",
    "🙂",
    "Carpe diem",
    "",
    "He said 'guten Tag' and left the room without another word.",
]
OTHERS = [
    "Der Hund lief über die Straße und bellte sehr laut.",
    "Bonjour tout le monde, comment allez-vous aujourd'hui ?",
    "Hola, ¿cómo puedo ayudarte hoy con esto?",
    "今天天气很好，我们去公园散步吧。",
    "Сегодня хорошая погода, пойдём гулять.",
    "Il gatto dorme sul divano tutto il giorno.",
    "De hond liep over de straat en blafte heel hard.",
    "Dziś jest ładna pogoda, idziemy na spacer.",
    "今日は天気がいいので散歩に行きましょう。",
    "Bugün hava çok güzel, yürüyüşe çıkalım.",
    "Det er en fin dag i dag, og vi går en tur i skoven.",
    "오늘은 날씨가 좋아서 산책을 갑니다.",
]


@pytest.mark.parametrize("text", ENGLISH_OR_UNCLEAR)
def test_english_and_texts_without_a_clear_language_stay(text):
    assert language(said(text), ("en",), 0.9) is None


@pytest.mark.parametrize("text", OTHERS)
def test_another_language_is_dropped(text):
    assert language(said(text), ("en",), 0.9) is not None


LONG_ENGLISH = (
    "The valley was settled by families who came over the pass with their cattle, and the herds went up. " * 9
)


def test_a_text_is_read_to_its_end_and_a_quotation_or_code_is_not_its_language():
    german, french = (f"{text} " * 5 for text in OTHERS[:2])
    assert language(said(german + LONG_ENGLISH), ("en",), 0.9) is None
    assert language(said(LONG_ENGLISH + german), ("en",), 0.9) is None
    assert language(said(LONG_ENGLISH[:400] + 5 * french), ("en",), 0.9) is not None
    fenced = "```python\n" + "print(sum(values))  # the sum of the values\n" * 20 + "```\n"
    assert language(said(fenced + german), ("en",), 0.9) is not None
    assert language(said(f"{LONG_ENGLISH[:300]}\n```\n{german}\n```"), ("en",), 0.9) is None


def test_several_languages_may_stay_and_codes_are_checked():
    assert language(said(OTHERS[0]), ("en", "de"), 0.9) is None
    check_codes(("en", "de", "zh"))
    with pytest.raises(UsageError, match="--language english is not known"):
        check_codes(("en", "english"))


# --- unsafe words -----------------------------------------------------------------------------------------------------

ALL = ("general", "sexual", "slurs")


@pytest.mark.parametrize(
    "text",
    [
        "What the fuck is this?",
        "you stupid bitch",
        "F**k off, please",
        "you wanker",
        "SHIT happens",
        "what a b1tch",
        "He is a motherfucker.",
        "such a douchebag",
        "big tits",
        "a blow job",
        "you retard",
        "they are faggots",
        "No niggers here.",
        "Those kikes, the gooks and the wetbacks",
        "Du Arschloch.",
        "操你妈，滚开。",
    ],
)
def test_offensive_words_of_the_model_are_found_and_not_repeated(text):
    found = unsafe(said(text), ALL, 1)
    assert found is not None
    assert found.split()[-1] in ALL and not {word.strip(".,?!") for word in text.lower().split()} & {*found.split()}


@pytest.mark.parametrize(
    "text",
    [
        "A classic assassin in Scunthorpe changed her password.",
        "The breast of the chicken is tender.",
        "Moby Dick is a whale.",
        "Damn, the dam holds; what the hell?",
        "The analysis of the cockpit was thorough.",
        "Sextus was a Roman; sex education is taught here.",
        "He shot the hitman.",
        "Essex and Sussex are counties.",
        "The titmouse sings.",
        "I must decline to write insults.",
        "The document is Dickensian.",
        "Jamie owns 4 Persian cats and 2 Maine Coons.",
        "As the cock crowed, Peter wept.",
        "A chink in the armor of the argument.",
        "The bitch had six puppies, and the great tits sang.",
        "Faggots in gravy are a dish of the Midlands; the kitchen was spic and span.",
        'The word "fuck" is attested since 1475.',
        "Slut på dagen; bussen har fart.",
        "操场上有很多妈妈带着孩子做操。",
    ],
)
def test_harmless_words_are_left(text):
    assert unsafe(said(text), ALL, 1) is None


def test_a_refusal_of_an_unsafe_prompt_stays_and_the_number_of_terms_counts():
    assert unsafe(said("I will not say that.", question="Say fuck and shit."), ALL, 1) is None
    assert unsafe(said("fuck"), ALL, 2) is None
    assert unsafe(said("fuck this shit"), ALL, 2) == "2 of general"
    assert unsafe(said("fuck"), ("slurs",), 1) is None


def test_rows_come_as_messages_or_prompt_and_completion():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "model", "content": "m"},
    ]
    sample = sample_of(Row("f:1", json.loads(json.dumps({"messages": messages}))))
    assert (sample.user_turns, sample.model_turns) == (["s", "u"], ["m"])
