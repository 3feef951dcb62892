"""Personal information: addresses, numbers and keys that belong to somebody.

Every kind has a cheap pattern and then a real check: phonenumbers (metadata of libphonenumber), python-stdnum (check
digits), `ipaddress`. A phone number must be grouped as its country groups it (STRICT_GROUPING): 12345-67890 is a
subtraction. Four small numbers with dots are a version unless the text speaks of a host. Values of public services and
private networks, and those reserved for examples, tests and fiction, belong to nobody. The detail names the kind, never
the value.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .published_numbers import EXAMPLE_IBANS, EXAMPLE_IDS, PUBLIC_ADDRESSES, TEST_CARDS
from .sample import Sample
from .secrets import has_secret

if TYPE_CHECKING:
    from phonenumbers import PhoneNumber, PhoneNumberMatch

__all__ = ["check_region", "personal"]

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24}\b(?!\()", re.I)
# RFC 2606 and 6761: these domains belong to nobody; and the usual placeholders.
RESERVED_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost|local|internal"
    r"|(?:foo|bar|baz|xyz|domain|yourdomain|mydomain|yourcompany|email)\.(?:com|org|net))$",
    re.IGNORECASE,
)
SPELT_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]+(?: dot [\w+-]+)*\s*(?:\[at\]|\(at\)| at )\s*[a-z0-9-]+"
    r"(?:\s*(?:\[dot\]|\(dot\)| dot )\s*[a-z]{2,24})+\b",
    re.IGNORECASE,
)
NOBODY = re.compile(r"^(?:git|no-?reply|donotreply|do-not-reply|postmaster|mailer-daemon)$", re.IGNORECASE)
DIGITS = re.compile(r"\d(?:[ .()/-]{0,2}\d){6}")
# Words for a phone, by the countries whose numbers may follow without a prefix.
PHONE_CUES = {
    ("US", "GB"): r"\b(?:phone|telephone|tel|mobile|cell|call|text|fax|whatsapp|sms|dial|ring)\b",
    ("DE", "AT", "CH"): r"\b(?:telefon\w*|handy\w*|mobil\w*|(?:meine|ihre|seine) nummer|unter)\b",
    ("FR",): r"\b(?:téléphone|tél|portable|appelez|appelle)\b",
    ("ES", "MX", "IT", "BR"): r"\b(?:tel[eéè]fono?|m[oó]vil|celular|cellulare|chiama\w*|ll[aá]ma\w*|telefone)\b",
    ("NL", "PL", "SE", "TR"): r"\b(?:telefoon\w*|bel|numer|telefonu|telefonnummer|ring|telefonum|numaram)\b",
    ("RU",): r"(?:телефон|номер|звоните)\w*",
    ("CN",): r"(?:手机|电话|微信)[^\d\n]{0,4}",
    ("JP",): r"(?:電話|携帯)[^\d\n]{0,4}",
    ("KR",): r"(?:전화|번호|휴대폰)[^\d\n]{0,4}",
    ("IN",): r"(?:फ़ोन|फोन|मोबाइल|नंबर)",
}
CUED_NUMBER = [
    (regions, re.compile(rf"{words}[^\d\n]{{0,20}}(?P<number>(?:\+|\()?\d[\d ().-]{{6,17}}\d)(?![\d-])", re.IGNORECASE))
    for regions, words in PHONE_CUES.items()
]
BARE_NUMBER = re.compile(r"[(-]*\d+\)?")
# Fictitious numbers: North America's exchange 555, and the ranges of Ofcom for drama.
FICTITIOUS = re.compile(r"1\d{3}555\d{4}|447700900\d{3}|442079460\d{3}|441632960\d{3}|44\d{2,3}4960\d{3}")
CARD = re.compile(r"(?<![\d.,-])(?:\d[ -]?){12,18}\d(?![\d-]|[.,]\d)")
# Issuers: Visa, Mastercard, American Express, Discover, Diners Club, JCB, UnionPay.
CARD_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:2[2-9]|[3-6]\d|7[01]|720)\d{12,13}|3[47]\d{13}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|35\d{14}|62\d{14,17}"
)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{1,4}(?![\w:.])", re.IGNORECASE)
VERSION_BEFORE = re.compile(
    r"(?:\bv|versi[oó]n|\brelease|\bsection|\bchapter|\bclause|\bfirmware|\bbuild|\bdriver|\bdll\b|\boid\b|\bpackage"
    r"|\blibrar|\bupgrade|\bupdate|\binstall|mise à jour|版本|バージョン|ライブラリ)[^\n.!?]{0,25}$",
    re.I,
)
HOST_BEFORE = re.compile(
    r"(?:\bip\b|\bips\b|address|adress|dirección|адрес|地址|アドレス|\bhosts?\b|\bserver|\bping|\bssh\b|\bcurl\b|://|@"
    r"|\blog(?:ged|in)\b|\bconnect|\bfrom\b|\bclient\b|\bpeer\b|\brouter|\bgateway|\bdns\b|\bbanned\b|\bblock)[^\n]{0,40}$",
    re.I,
)
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that is assigned; ::2 is a slice
LARGE_OCTET = 64  # two of them are an address also where nothing around it speaks of a host
# Country -> (regular expression, module of python-stdnum that knows its check digits).
NATIONAL_IDS = {
    "US": (r"\d{3}-\d{2}-\d{4}", "stdnum.us.ssn"),
    "BR": (r"\d{3}\.\d{3}\.\d{3}-\d{2}", "stdnum.br.cpf"),
    "IN": (r"\d{4} \d{4} \d{4}", "stdnum.in_.aadhaar"),
    "FR": (r"[12] ?\d{2} ?[01]\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}", "stdnum.fr.nir"),
    "ES": (r"(?:\d{8}|[XYZ]\d{7})-?[A-Z]", "stdnum.es.nif"),
    "IT": (r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]", "stdnum.it.codicefiscale"),
    "FI": (r"\d{6}[+A-]\d{3}[0-9A-Y]", "stdnum.fi.hetu"),
    "SE": (r"\d{6}-\d{4}", "stdnum.se.personnummer"),
    "KR": (r"\d{6}-\d{7}", "stdnum.kr.rrn"),
    "CN": (r"\d{17}[\dX]", "stdnum.cn.ric"),
    "MX": (r"[A-Z]{4}\d{6}[HM][A-Z]{5}[0-9A-Z]\d", "stdnum.mx.curp"),
}
# Not part of a longer number: no signs and no further groups of digits around it.
NATIONAL_ID = {
    country: (re.compile(rf"(?<![\w.-])(?<!\d ){spelt}(?![\w-]|\.\d| \d)"), module)
    for country, (spelt, module) in NATIONAL_IDS.items()
}
UK_NINO = re.compile(r"\b(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]\b")
CAPITALS_AND_DIGITS = re.compile(r"[A-Z]{2} ?\d{2}")
FOUR_NUMBERS = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")


def check_region(region: str) -> None:
    """Raise UsageError for a country whose numbers are not known; without one only those with + count."""
    from phonenumbers import SUPPORTED_REGIONS

    if region and region not in SUPPORTED_REGIONS:
        raise UsageError(f"--phone-region {region} is not known", "give an ISO 3166 code, for example US, DE or JP")


def personal(sample: Sample, region: str) -> str | None:
    """Report the kinds of personal information in all turns. `region`: country of phone numbers without prefix."""
    found = list(dict.fromkeys(_kinds(sample.whole, region)))
    return ", ".join(found) if found else None


def _kinds(text: str, region: str) -> Iterator[str]:
    if _has_email(text):
        yield "e-mail address"
    number = _kind_of_number(text, region)
    if number:
        yield number
    if any(_is_public_address(text, found) for found in _addresses(text)):
        yield "IP address"
    if has_secret(text):
        yield "key or token"


def _kind_of_number(text: str, region: str) -> str | None:
    """Return the kind of number in a text; digits that fit several kinds count as the one with the strictest check."""
    digits, capitals = DIGITS.search(text), CAPITALS_AND_DIGITS.search(text)
    if capitals and any(map(_is_iban, IBAN.finditer(text))):
        return "bank account"
    if digits and any(map(_is_card, CARD.finditer(text))):
        return "card number"
    if (capitals and UK_NINO.search(text)) or ((digits or capitals) and _has_national_id(text)):
        return "national id"
    return "phone number" if digits and _has_phone(text, region) else None


def _has_email(text: str) -> bool:
    if "@" in text and any(map(_is_email, EMAIL.finditer(text))):
        return True
    folded = text.casefold()
    return ("[at]" in folded or "(at)" in folded or " dot " in folded) and SPELT_EMAIL.search(text) is not None


def _is_email(found: re.Match[str]) -> bool:
    local, _, domain = found.group().rpartition("@")
    return not RESERVED_DOMAIN.search(domain) and not NOBODY.search(local)


def _is_card(found: re.Match[str]) -> bool:
    from stdnum import luhn

    number = re.sub(r"\D", "", found.group())
    return CARD_ISSUER.fullmatch(number) is not None and luhn.is_valid(number) and number not in TEST_CARDS


def _is_iban(found: re.Match[str]) -> bool:
    from stdnum import iban

    # Words in capitals may follow the number: the longest valid prefix counts.
    groups = found.group().split(" ")
    tries = ("".join(groups[:end]) for end in range(len(groups), 0, -1))
    return any(iban.is_valid(number) and number not in EXAMPLE_IBANS for number in tries)


def _has_national_id(text: str) -> bool:
    for pattern, module in NATIONAL_ID.values():
        for found in pattern.finditer(text):
            if found.group() not in EXAMPLE_IDS and import_module(module).is_valid(found.group()):
                return True
    return False


def _has_phone(text: str, region: str) -> bool:
    import phonenumbers as pn

    def found_by(leniency: int) -> Iterator[PhoneNumberMatch]:
        return iter(pn.PhoneNumberMatcher(text, region or None, leniency=leniency))

    # A prefix says that it is a phone number, however it is grouped.
    prefixed = (
        one for one in found_by(pn.Leniency.VALID) if one.raw_string.startswith("+") and _alone(text, one.start)
    )
    for found in itertools.chain(prefixed if "+" in text else (), found_by(pn.Leniency.STRICT_GROUPING)):
        written = found.raw_string
        # Bare digits are a quantity, an order or an id, unless the text before them mentions a phone.
        if not BARE_NUMBER.fullmatch(written) and not IPV4.fullmatch(written) and _of_somebody(found.number):
            return True
    for regions, pattern in CUED_NUMBER:
        for cued in pattern.finditer(text):
            if any(_is_phone(cued["number"], country) for country in dict.fromkeys((region, *regions)) if country):
                return True
    return False


def _alone(text: str, start: int) -> bool:
    """Whether a sign is not between two parts of a sum."""
    return not text[:start].rstrip()[-1:].isalnum() or text[start - 1 : start].isspace()


def _is_phone(written: str, region: str) -> bool:
    import phonenumbers as pn

    if IPV4.fullmatch(written):
        return False
    try:
        number = pn.parse(written, region)
    except pn.NumberParseException:
        return False
    return pn.is_valid_number(number) and _of_somebody(number)


def _of_somebody(number: PhoneNumber) -> bool:
    import phonenumbers as pn

    of_nobody = (
        pn.PhoneNumberType.TOLL_FREE,
        pn.PhoneNumberType.PREMIUM_RATE,
        pn.PhoneNumberType.SHARED_COST,
        pn.PhoneNumberType.UAN,
        pn.PhoneNumberType.VOICEMAIL,
    )
    written = pn.format_number(number, pn.PhoneNumberFormat.E164)[1:]
    return pn.number_type(number) not in of_nobody and not FICTITIOUS.fullmatch(written)


def _addresses(text: str) -> Iterator[re.Match[str]]:
    if FOUR_NUMBERS.search(text):
        yield from IPV4.finditer(text)
    if text.count(":") > 1:
        yield from IPV6.finditer(text)


def _is_public_address(text: str, found: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(found.group())
    except ValueError:
        return False
    if str(address) in PUBLIC_ADDRESSES or not address.is_global or address.is_multicast:
        return False
    if address.version == 6:
        return address in GLOBAL_UNICAST
    return not _is_version(text, found)


def _is_version(text: str, found: re.Match[str]) -> bool:
    """Whether four numbers are a version, a section or an object id, by their size and the text before them."""
    before = text[max(0, found.start() - 60) : found.start()]
    if VERSION_BEFORE.search(before) or re.search(r"(?:[=<>~!]=|[\^~])$", before):
        return True
    large = sum(int(octet) >= LARGE_OCTET for octet in found.group().split("."))
    return large < 2 and HOST_BEFORE.search(before) is None
