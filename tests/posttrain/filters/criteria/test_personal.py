"""Personal information is found by real checks behind cheap patterns; what belongs to nobody is left alone."""

import random

import pytest
from samples import said

from gemma2.posttrain.filters.criteria.personal import personal

POSITIVE = [
    ("Write to jane.doe@gmail.com.", "e-mail address"),
    ("Contact: a.b-c+news@mail.uni-koeln.de!", "e-mail address"),
    ("mail <m_smith99@yahoo.co.uk> today", "e-mail address"),
    ("Call me at +49 30 901820 tonight.", "phone number"),
    ("You can reach her at (650) 253-0000.", "phone number"),
    ("650-253-0000 is the office", "phone number"),
    ("My phone: 6502530000", "phone number"),
    ("Ring +44 20 7031 3000, please", "phone number"),
    ("+20 100 218 4307 is hers", "phone number"),
    ("Handy: 0171 2380945", "phone number"),
    ("我的手机号是13810247735", "phone number"),
    ("ssh admin@23.4.12.9", "IP address"),
    ("The attacker came from 91.14.12.9.", "IP address"),
    ("contact: s.lindqvist [at] telia [dot] com", "e-mail address"),
    ("Card 4539 1488 0343 6467 exp 12/27", "card number"),
    ("5425-2334-3010-9903", "card number"),
    ("pay with 374245455400126 now", "card number"),
    ("IBAN DE75 5121 0800 1245 1261 99", "bank account"),
    ("Send it to FR7630006000011234567890189.", "bank account"),
    ("the account is GB33BUKB20201555555555 AND NOT ANOTHER", "bank account"),
    ("Her SSN is 536-90-4399.", "national id"),
    ("CPF 390.533.447-05", "national id"),
    ("El DNI es 54362315-K", "national id"),
    ("codice fiscale RCCMNL83S18D969H", "national id"),
    ("NI number AB 12 34 56 C", "national id"),
    ("personnummer 811218-9876", "national id"),
    ("NIR 2 95 10 99 126 111 93", "national id"),
    ("Server at 93.184.216.34 answered", "IP address"),
    ("ping 2a00:1450:4001:81b::200e", "IP address"),
    ("key AKIAQ3EGRZVJ7PLNWT5M", "key or token"),
    ("token ghp_R4tq9ZbVx7LmN2cKs8WdYhPj3GfTa6Qe1UoX", "key or token"),
    ("export OPENAI_API_KEY=sk-proj-aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zZ1bC3", "key or token"),
    ("xoxb-918273645546-Qw8eRt7yUi6oPa5sDf4g", "key or token"),
    (
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAx8Zq3Jt0Vd5uKp7RfYw2LmNb9TgHs4EcXaQoPiUyDkGvBjW3\n",
        "key or token",
    ),
]
NEGATIVE = [
    "user@example.com",
    "someone@mail.example.org and x@localhost.localdomain.test",
    "git@github.com:torvalds/linux.git",
    "no-reply@company.com",
    "@decorator\ndef f(): pass",
    "C = A@B",
    "weights @ x.T",
    "the handle @jane_doe",
    "Call 911 or 112.",
    "Dial 1-800-273-8255 for the hotline.",
    "(212) 555-0123 is the hero's number",
    "+44 20 7946 0958",
    "The answer is 6502530000 units.",
    "12345 * 67890 = 838102050",
    "pi = 3.14159265358979",
    "On 2025-11-21 10:58:00 it rained.",
    "ISBN 978-0-306-40615-7",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13",
    "4111 1111 1111 1111 is a test card",
    "1234 5678 9012 3456",
    "4539 1488 0343 6468 has a wrong check digit",
    "GB82 WEST 1234 5698 7654 32 is the usual example",
    "DE00 1234 5678 9012 3456 78",
    "SSN 123-45-6789",
    "078-05-1120",
    "000-12-3456 is never issued",
    "QQ 12 34 56 C",
    "127.0.0.1",
    "192.168.1.10 and 10.0.0.1",
    "192.0.2.44",
    "8.8.8.8",
    "version 4.18.2.31 of the driver",
    "see section 23.4.12.9",
    "fe80::1",
    "2001:db8::8a2e:370:7334",
    "12:30:45",
    "std::vector<int>::iterator",
    "AKIAIOSFODNN7EXAMPLE",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "OPENAI_API_KEY=sk-your-key-here",
    "a sk-learn-like-interface-for-everything-else",
    "ghp_ followed by 36 letters",
    "In 1984 there were 1,234,567 people.",
    "0.1 + 0.2 = 0.30000000000000004",
    "The population is 331 449 281.",
    "order no. 20231105-0042",
    "Route 66, 90210 Beverly Hills",
    "ABCD12 is a part number",
    "RGB(255, 255, 255)",
    "The answer is 12345-67890 = -55545.",
    "30000-11520=18480 elephants are left",
    "grpcio==1.62.1.20",
    "pip install somepackage==4.31.7.12",
    '"left-pad": "^1.14.20.3"',
    "Update firmware 23.4.12.9 first",
    "postgresql-client-14.9.22.1.deb was not found",
    "The object id 2.16.84.1 is registered.",
    "print(items[::2], items[1::8], items[::-1])",
    "foo@bar.com",
    "int_min = (-2147483646) and size = (2147483649)",
]


@pytest.mark.parametrize(("text", "kind"), POSITIVE)
def test_values_that_belong_to_somebody_are_found(text, kind):
    assert personal(said(text), "US") == kind


@pytest.mark.parametrize("text", NEGATIVE)
def test_values_that_belong_to_nobody_are_left(text):
    assert personal(said(text), "US") is None


def test_no_subtraction_is_a_phone_number():
    drawn = random.Random(0)
    pairs = [(drawn.randrange(10000, 99999), drawn.randrange(10000, 99999)) for _ in range(500)]
    assert [pair for pair in pairs if personal(said("The result is {}-{}.".format(*pair)), "US")] == []


def test_the_users_turns_are_read_too_and_the_detail_names_no_value():
    found = personal(said("Done.", question="I am jane.doe@gmail.com, call +49 30 901820"), "")
    assert found == "e-mail address, phone number"


def test_national_numbers_are_those_of_the_region():
    text = said("The number is 030 901820.")
    assert personal(text, "DE") == "phone number"
    assert personal(text, "US") is None
    assert personal(said("It is (650) 253-0000."), "") is None
