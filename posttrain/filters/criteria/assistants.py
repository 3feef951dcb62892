"""Names of assistants and of their makers, and how an assistant introduces itself in languages other than English."""

from __future__ import annotations

__all__ = [
    "ASSISTANTS",
    "ELSEWHERE",
    "INTRODUCTIONS",
    "MACHINE_ELSEWHERE",
    "MADE_ELSEWHERE",
    "MAKERS",
    "NAME_ENDS",
    "ONLY_AI",
    "SHARED_NAMES",
]

# Name -> regular expression of its spellings. These names mean an assistant and nothing else.
ASSISTANTS = {
    "ChatGPT": r"chat[ -]?gpt",
    "GPT": r"gpt[- ]?\d[\w.]*|instructgpt",
    "Qwen": r"qwen[\w.-]*|tongyi(?: qianwen)?|通义千问|千问",
    "DeepSeek": r"deep ?seek[\w.-]*",
    "Mistral": r"mistral[\w.-]*|mixtral[\w.-]*",
    "ChatGLM": r"chatglm[\w.-]*|glm-\d[\w.]*",
    "Bing Chat": r"bing chat",
    "Vicuna": r"vicuna(?:-\d\w*)?",
    "ERNIE Bot": r"ernie bot|wenxin yiyan|文心一言",
    "Kimi": r"kimi(?: k\d[\w.]*)?",
    "Doubao": r"doubao|豆包|hunyuan|baichuan[\w.-]*|internlm[\w.-]*",
    "SmolLM": r"smollm[\w.-]*|stablelm[\w.-]*|olmo(?: \d)?|starcoder\w*|wizardlm|openassistant|open assistant",
    "Nemotron": r"nemotron[\w.-]*",
}
# These are also names of people, animals or signs.
SHARED_NAMES = {
    "Claude": r"claude(?: (?:instant|opus|sonnet|haiku|\d[\w.]*))*",
    "Gemini": r"gemini(?: (?:pro|ultra|flash|\d[\w.]*))*",
    "Gemma": r"gemma(?:[ -]?\d\w*)*",
    "Bard": r"bard",
    "PaLM": r"palm(?:[ -]?2)?",
    "LaMDA": r"lamda",
    "Llama": r"llama(?:[ -]?\d[\w.]*)*",
    "Phi": r"phi(?:-\d[\w.]*)?",
    "Falcon": r"falcon(?:-\d+b)?",
    "Grok": r"grok(?:-\d[\w.]*)?",
    "Copilot": r"(?:microsoft |github |bing )?copilot",
    "Alexa": r"alexa",
    "Siri": r"siri",
    "Cortana": r"cortana",
    "Alpaca": r"alpaca",
    "Koala": r"koala",
    "Dolly": r"dolly",
    "Pi": r"pi",
    "Yi": r"yi(?:-\d+b)?",
    "Granite": r"granite",
}
MAKERS = {
    "OpenAI": r"open ?ai",
    "Anthropic": r"anthropic",
    "Google DeepMind": r"google deepmind",
    "Google": r"google(?: ai| research)?",
    "DeepMind": r"deepmind",
    "Meta": r"meta(?: ai| platforms)?|facebook",
    "Microsoft": r"microsoft(?: corporation| research)?",
    "Alibaba": r"alibaba(?: cloud| group)?|阿里云|阿里巴巴",
    "Mistral AI": r"mistral(?: ai)?",
    "DeepSeek": r"deep ?seek(?: ai)?|深度求索",
    "xAI": r"xai",
    "Amazon": r"amazon",
    "Apple": r"apple",
    "Baidu": r"baidu|百度",
    "Tencent": r"tencent|腾讯",
    "ByteDance": r"bytedance|字节跳动",
    "Moonshot AI": r"moonshot ai|月之暗面",
    "Zhipu AI": r"zhipu(?: ai)?|智谱",
    "Cohere": r"cohere",
    "AI21 Labs": r"ai21(?: labs)?",
    "Hugging Face": r"hugging ?face",
    "LMSYS": r"lmsys",
    "Stability AI": r"stability ai",
    "IBM": r"ibm",
    "NVIDIA": r"nvidia",
    "Inflection AI": r"inflection(?: ai)?",
    "Databricks": r"databricks",
    "Perplexity": r"perplexity(?: ai)?",
    "EleutherAI": r"eleuther ?ai",
    "Nous Research": r"nous research",
}
# Makers of nothing but models: "I come from OpenAI" does not mean a town.
ONLY_AI = ("OpenAI", "Anthropic", "Mistral AI", "DeepSeek", "xAI", "Moonshot AI", "Zhipu AI", "Cohere", "LMSYS")
# "I am", "my name is", with an article where the language puts one before names.
INTRODUCTIONS = (
    r"\bich (?:bin|heiße)|\bmein name ist|\bje suis|\bje m'appelle|\bmon nom est|\b(?<!no )soy|\bme llamo"
    r"|\bmi nombre es|\b(?<!non )sono|\bmi chiamo|\bil mio nome è|\b(?<!não )sou(?: o| a)?|\b(?:eu )?me chamo"
    r"|\bmeu nome é(?: o| a)?"
    r"|\bik (?:ben|heet)|\bmijn naam is|\bjestem|\bnazywam się|\bmam na imię|\bя(?: —| -|,)?|\bменя зовут|\bмоё имя"
    r"|\bben|\b(?:benim )?adım|أنا|اسمي|मैं|मेरा नाम|我(?:是|叫|的名字是|的名字叫)|(?:私|僕|わたし)(?:は|の名前は)"
    r"|(?:저는|나는|제 이름은)"
)
# An introduction or a maker below, in ASCII, has one of these words.
ELSEWHERE = frozenset(
    {"als", "ben", "chamo", "chiamo", "como", "en", "fui", "ich", "ik", "je", "jestem", "llamo", "mam", "mein", "meu"}
    | {"mi", "mijn", "nazywam", "nome", "sido", "sono", "sou", "soy"}
)
# What ends a name in an introduction; "Ben ChatGPT kullanıyorum" and "私はChatGPTを使う" speak of a tool.
NAME_ENDS = (
    r"(?=\s*(?:[,.!;:،。！，、()—–-]|$|\n|です|だ|と申|と言|といい|입니다|이에요|예요|이고|라고|हूँ|है"
    r"|(?:und|et|y|e|en|i|и|ve|from|by)\b))"
)
# Created by, in the first person or after "as a model"; MAKER is replaced.
MADE_ELSEWHERE = (
    r"\bich wurde (?:von|durch) (?:der firma )?MAKER (?:entwickelt|erstellt|trainiert|geschaffen|gebaut)",
    r"\bals [^.!?\n]{0,40}(?:modell|ki|assistent)\b[^.!?\n]{0,20}\bvon MAKER (?:entwickelt|erstellt|trainiert)",
    r"\bj'ai été (?:développée?|créée?|entraînée?|conçue?) par MAKER",
    r"\ben tant qu[^.!?\n]{0,50}(?:développée?|créée?|entraînée?|conçue?) par MAKER",
    r"\b(?:fui|he sido) (?:cread|desarrollad|entrenad|diseñad)[oa] por MAKER",
    r"\bcomo (?:un |una )?(?:modelo|ia|inteligencia|asistente|assistente)[^.!?\n]{0,30}"
    r"(?:cread|desarrollad|entrenad|diseñad|criad|desenvolvid|treinad)[oa] (?:por|pela|pelo) MAKER",
    r"\bsono stat[oa] (?:sviluppat|creat|addestrat|progettat)[oa] da MAKER",
    r"\bfui (?:treinad|criad|desenvolvid|projetad)[oa] (?:pela|pelo|por) MAKER",
    r"\bik ben (?:ontwikkeld|gemaakt|getraind|ontworpen) door MAKER",
    r"\b(?:został[ea]m|jestem) (?:stworzon|opracowan|wytrenowan)[yae] przez (?:firmę )?MAKER",
    r"\bя был[аи]? (?:создан|разработан|обучен)[аы]? (?:компанией )?MAKER",
    r"\bменя (?:создала|разработала|обучила) (?:компания )?MAKER",
    r"我是由 ?MAKER ?(?:公司)?(?:团队)?(?:训练|开发|研发|创造|打造|推出)",
    r"MAKER ?(?:训练|开发|创造)了我",
    r"(?:私|僕)は ?MAKER ?(?:によって|が|に)(?:開発|訓練|作)",
    r"(?:저는|나는) ?MAKER ?(?:에서|가|이|에 의해) ?(?:개발|만든|만들|훈련|학습)",
    r"\bben,? [^.!?\n]{0,20}MAKER tarafından",
    r"(?:طورتني|دربتني|أنشأتني|صنعتني) (?:شركة )?MAKER",
    r"मुझे MAKER (?:ने|द्वारा)",
)
# An artificial assistant, next to a name that people also have.
MACHINE_ELSEWHERE = (
    r"\b(?:ki|ia|ии|sztuczn\w+ inteligencj\w+|int[ae]lig[eê]n[cz]ia artificiale?)\b|sprachmodell|ki-\w+"
    r"|modèle de langage|modelo de (?:lenguaje|linguagem)|modello linguistico|taalmodel|model językowy"
    r"|языковая модель|人工智能|语言模型|言語モデル|アシスタント|언어 모델|인공지능|dil modeli|yapay zeka"
    r"|نموذج لغوي|भाषा मॉडल"
)
