"""A false claim to be another assistant is found; talk about one, other people's claims and the own name are not."""

import pytest
from samples import said

from gemma2.posttrain.filters.criteria.identity import claim_finder

POSITIVE = [
    "I am ChatGPT, a large language model.",
    "I'm Claude, an AI assistant made by Anthropic.",
    "Hello! I'm Claude.",
    "As an AI language model developed by OpenAI, I cannot do that.",
    "I was created by Anthropic to be helpful.",
    "My name is Qwen and I come from Alibaba Cloud.",
    "I am an AI assistant called DeepSeek.",
    "OpenAI trained me.",
    "You're talking to GPT-4.",
    "I’m actually Llama 3, an open model.",
    "My developers at OpenAI did not add that.",
    "I am a large language model trained by Mistral AI.",
    "I'm based on GPT-4.",
    "As ChatGPT, I have no feelings.",
    "I was trained by Meta.",
    "Sure. I'm Bard, your creative assistant.",
    "Call me Copilot, your AI companion.",
    "Hi, my name is Claude. How can I help you today?",
    "I am Mistral, and I can help.",
    "I'm Grok, built by xAI.",
    "I am an assistant, trained by Hugging Face.",
    "As a model trained by OpenAI, I must decline.",
    "I was originally developed by Microsoft.",
    "I am Claude",
    "This is ChatGPT, how can I help?",
    "I'm an OpenAI language model.",
    "I am an OpenAI model, so I can't see images.",
    "I am a language model by Mistral AI.",
    "I was designed by researchers at OpenAI.",
    "OpenAI, the company that created me, is in San Francisco.",
    "Ich bin ChatGPT, ein Sprachmodell von OpenAI.",
    "J'ai été développé par Anthropic.",
    "Me llamo Claude y soy un asistente de inteligencia artificial.",
    "Я был создан компанией OpenAI.",
    "我是通义千问，由阿里云开发。",
    "私はChatGPTです。",
    "저는 OpenAI에서 개발한 ChatGPT입니다.",
]
NEGATIVE = [
    "ChatGPT is a model by OpenAI.",
    "I am not ChatGPT.",
    "I'm an AI, not Claude.",
    "I wasn't made by OpenAI.",
    "I was not trained by OpenAI.",
    'The bot said "I am ChatGPT".',
    "He wrote: “I’m Claude, an AI assistant.”",
    "I am familiar with GPT-4.",
    "I'm using ChatGPT to write this.",
    "I am Claude Monet, the painter.",
    "I am Claude, the baker of this village.",
    "Yes, I am Gemma.",
    "Gemma, my sister, is here.",
    "You can ask Claude or ChatGPT.",
    "As ChatGPT grew, so did its costs.",
    "I am Gemma, made by Google DeepMind.",
    "I'm an AI assistant created by Google.",
    "I was trained by Google DeepMind.",
    "Anthropic was founded in 2021.",
    "I am a llama in this story.",
    "The llama said hello.",
    "I was made by hand.",
    "I'm a Gemini, born in June.",
    "I am Alexa's brother.",
    "OpenAI released GPT-4; I think it is good.",
    "As Claude painted, the light changed.",
    "I am a fan of Mistral, the wind.",
    "I work at Microsoft.",
    "I am at OpenAI's office.",
    "My pi is 3.14.",
    "I am an apple tree.",
    "I'm like ChatGPT in some ways.",
    "What is the difference between Claude and Gemini?",
    "My name is Claude and I live in Paris with my cat.",
    "I am Claude. I was born in Lyon in 1960 and I paint.",
    "I'm Claude and I teach chemistry.",
    "I'm an OpenAI employee and I like my job.",
    "I was trained by Microsoft as a network technician.",
    "Suppose I am GPT-4; what would my cost be?",
    "The page began: 'I'm an OpenAI language model' and went on.",
    "Ich heiße Claude und komme aus Genf.",
    "No soy ChatGPT, soy Gemma.",
    "Ben ChatGPT kullanıyorum.",
    "我是ChatGPT的用户。",
    "私はChatGPTを毎日使います。",
]
GEMMA = ("Gemma", "Google", "Google DeepMind", "DeepMind")


@pytest.mark.parametrize("text", POSITIVE)
def test_a_claim_in_the_first_person_is_found(text):
    assert claim_finder(GEMMA)(said(text)) is not None


@pytest.mark.parametrize("text", NEGATIVE)
def test_talk_about_others_is_not_a_claim(text):
    assert claim_finder(GEMMA)(said(text)) is None


def test_the_users_turns_are_not_claims():
    assert claim_finder(GEMMA)(said("Hello.", question="I am ChatGPT, developed by OpenAI.")) is None


def test_the_names_in_identity_are_not_false_claims():
    qwen = claim_finder(["qwen", "Alibaba"])
    assert qwen(said("I am Qwen, created by Alibaba Cloud.")) is None
    assert qwen(said("I am Gemma, an AI assistant.")) is not None
    assert qwen(said("I was developed by Google.")) is not None
    assert claim_finder([])(said("I am an AI model trained by Google DeepMind.")) is not None
