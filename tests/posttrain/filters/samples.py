"""Conversations for the tests of the filters."""

from gemma2.posttrain.filters.criteria.sample import Sample

QUESTION = "Can you tell me?"


def said(answer, question=QUESTION):
    """A conversation of one question and one answer."""
    return Sample([(False, question), (True, answer)])


def row(answer, question=QUESTION, **columns):
    """The same as a row of a file."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        **columns,
    }
