"""Numbers that look personal but belong to nobody: published for tests, documentation and public services."""

from __future__ import annotations

__all__ = ["EXAMPLE_IBANS", "EXAMPLE_IDS", "PUBLIC_ADDRESSES", "TEST_CARDS"]

# Published by payment services for tests.
TEST_CARDS = frozenset(
    [
        "4242424242424242",
        "4111111111111111",
        "4012888888881881",
        "4000056655665556",
        "5555555555554444",
        "5105105105105100",
        "2223003122003222",
        "378282246310005",
        "371449635398431",
        "6011111111111117",
        "6011000990139424",
        "30569309025904",
        "38520000023237",
        "3530111333300000",
        "3566002020360505",
        "6200000000000005",
        "4000000000000002",
        "4222222222222",
    ]
)
# From the standard and its articles.
EXAMPLE_IBANS = frozenset(
    [
        "GB82WEST12345698765432",
        "GB29NWBK60161331926819",
        "DE89370400440532013000",
        "FR1420041010050500013M02606",
        "NL91ABNA0417164300",
        "ES9121000418450200051332",
        "CH9300762011623852957",
        "IT60X0542811101000000123456",
    ]
)
# Printed on sample cards and in manuals.
EXAMPLE_IDS = frozenset(
    [
        "123-45-6789",
        "078-05-1120",
        "219-09-9999",
        "111.444.777-35",
        "123.456.789-09",
        "12345678Z",
    ]
)
# Public name servers, and a placeholder.
PUBLIC_ADDRESSES = frozenset(
    [
        "8.8.8.8",
        "8.8.4.4",
        "1.1.1.1",
        "1.0.0.1",
        "9.9.9.9",
        "149.112.112.112",
        "208.67.222.222",
        "208.67.220.220",
        "1.2.3.4",
        "2001:4860:4860::8888",
        "2001:4860:4860::8844",
        "2606:4700:4700::1111",
        "2606:4700:4700::1001",
    ]
)
