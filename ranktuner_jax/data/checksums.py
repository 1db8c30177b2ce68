"""Checksums of texts in parts, without reading the parts again."""

from __future__ import annotations

__all__ = ["combine"]

# CRC-32's polynomial, with the coefficient of x^0 in the highest bit.
_POLYNOMIAL = 0xEDB88320


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two texts together, from that of each.

    Bytes are the coefficients of a polynomial over GF(2), and a checksum is its remainder. To
    append a text of n bytes multiplies what was before it by x^(8 n).

    Args:
      first: The checksum of the first text.
      second: The checksum of the second.
      length: The bytes of the second.

    Example:
      >>> import zlib
      >>> combine(zlib.crc32(b"rank"), zlib.crc32(b"tuner"), 5) == zlib.crc32(b"ranktuner")
      True
    """
    power, square = 1 << 31, 1 << 23  # 1 and x^8
    while length:
        if length & 1:
            power = _product(power, square)
        square = _product(square, square)
        length >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """The product of two polynomials modulo CRC-32's."""
    product = 0
    while a:
        if a & (1 << 31):
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product
