"""TLS for bulk connections: a certificate made for this endpoint's lifetime, pinned over the control link.

The control link is encrypted and authenticated by CURVE, and carries each side's certificate to the other;
a bulk connection is believed only with exactly that certificate on both sides. No authority is involved.
"""

from __future__ import annotations

import datetime as dt
import os
import ssl

_FROM = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)  # clocks of hosts differ
_UNTIL = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)


def available() -> str:
    """Why there can be no TLS here; "" when there can."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        return (
            "with keys, bulk connections need the package cryptography: pip install cryptography"
            " (tensorferry's extra `tls`)"
        )
    return ""


class Identity:
    """One endpoint's certificate (DER) and what it is shown with."""

    def __init__(self) -> None:
        self.certificate, self._pem = _make()
        self._server = self._context(ssl.PROTOCOL_TLS_SERVER)
        self._server.num_tickets = 0

    def trust(self, certificate: bytes) -> None:
        """Let who has this certificate begin a connection; whether it is the right one is asked later."""
        self._server.load_verify_locations(cadata=certificate)

    @property
    def server(self) -> ssl.SSLContext:
        """For connections that are accepted."""
        return self._server

    def client(self, certificate: bytes) -> ssl.SSLContext:
        """For a connection to who has this certificate."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=certificate)
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with open(os.memfd_create("tensorferry-tls", os.MFD_CLOEXEC), "wb") as file:  # ssl reads files only
            file.write(self._pem)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context


def _make() -> tuple[bytes, bytes]:
    """A new self-signed certificate as DER, and key and certificate as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tensorferry")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    certificate = builder.not_valid_before(_FROM).not_valid_after(_UNTIL).sign(key, hashes.SHA256())
    plain = serialization.NoEncryption()
    encoding = serialization.Encoding
    pem = key.private_bytes(encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return certificate.public_bytes(encoding.DER), pem + certificate.public_bytes(encoding.PEM)
