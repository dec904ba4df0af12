"""Who may call: AE title, address and certificate of a peer, and the refusals of PS3.8."""

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dicomnode.config import Peer

logger = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ANY = "*"
RESOLVE_S = 60.0  # between looks at the names of peers
FIRST_RESOLVE_S = 3.0  # how long a start waits for them


@dataclass(frozen=True, slots=True)
class Rejection:
    """An A-ASSOCIATE-RJ: result, source and reason of PS3.8 Table 9-21, and why in our words."""

    result: int
    source: int
    reason: int
    why: str


CALLED_AE_TITLE = Rejection(1, 1, 7, "called AE title not recognized")
CALLING_AE_TITLE = Rejection(1, 1, 3, "calling AE title not recognized")
OTHER_ADDRESS = Rejection(1, 1, 3, "not an address of this peer")
OTHER_CERTIFICATE = Rejection(1, 1, 3, "not the certificate of this peer")
TOO_MANY = Rejection(2, 3, 2, "too many associations")
TOO_MANY_OF_PEER = Rejection(2, 3, 2, "too many associations of this peer")
NOT_JUDGED = Rejection(2, 1, 1, "an error of ours")
DISK_SHORT = Rejection(2, 3, 2, "disk short of space")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from; `here` is this machine, by whichever of its addresses."""

    address: Address
    here: bool


def origin(remote: str, own: str) -> Origin:
    """Return where a connection comes from, by the addresses of its two ends."""
    address, ours = parse(remote), parse(own)
    # Nobody else can send from an address of ours: Linux drops such packets as martians.
    return Origin(address, address.is_loopback or address == ours)


def parse(address: str) -> Address:
    """Return an address without its zone; IPv4 in IPv6 (::ffff:10.0.0.5) as IPv4."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        return parsed.ipv4_mapped
    return parsed


@dataclass(frozen=True, slots=True)
class _Places:
    """Where one peer may call from."""

    networks: tuple[Network, ...] = ()
    here: bool = False  # from this machine, by whichever of its addresses

    def include(self, origin: Origin) -> bool:
        return (self.here and origin.here) or any(origin.address in n for n in self.networks)


@dataclass(slots=True)
class _Entry:
    peer: Peer
    places: _Places = field(default_factory=_Places)
    resolved: bool = True


class Directory:
    """The peers that may call, and their addresses.

    A peer with `addresses` may call from those and no others. Else from the addresses that its
    `host` has; a name is looked up at the start and every minute, and when the lookup fails, the
    last answer stands. A peer whose host is this machine may call from any address of this
    machine: 127.0.0.1, ::1 and the rest are one place.
    """

    def __init__(
        self,
        peers: Iterable[Peer],
        look_up: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        self._look_up = look_up or addresses_of
        self._entries = {p.ae_title: _Entry(p) for p in peers if p.calling}
        self._named: list[_Entry] = []
        for entry in self._entries.values():
            if entry.peer.addresses:
                entry.places = _Places(tuple(_networks(entry.peer.addresses)))
                continue
            try:
                entry.places = _places([entry.peer.host])
            except ValueError:
                entry.resolved = False
                self._named.append(entry)
        self._stop = threading.Event()
        self._first = threading.Event()

    def start(self) -> None:
        """Look the names up, and again every minute, in a thread of its own."""
        if self._named:
            threading.Thread(target=self._keep_looking, daemon=True).start()
            self._first.wait(FIRST_RESOLVE_S)

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def peer(self, ae_title: str) -> Peer | None:
        """Return the peer of that AE title that may call, None where there is none."""
        entry = self._entries.get(ae_title.strip(" "))
        return entry.peer if entry else None

    def admits(self, origin: Origin) -> bool:
        """Whether any peer may call from there."""
        return any(entry.places.include(origin) for entry in self._entries.values())

    def matches(self, ae_title: str, origin: Origin) -> bool:
        """Whether that peer may call from there."""
        entry = self._entries.get(ae_title.strip(" "))
        return entry is not None and entry.places.include(origin)

    def networks(self, ae_title: str) -> tuple[str, ...]:
        """Return where that peer may call from, for people to read."""
        places = self._entries[ae_title].places
        shown = [
            str(n.network_address) if n.num_addresses == 1 else str(n) for n in places.networks
        ]
        return (*shown, *(["this machine"] if places.here else []))

    def refresh(self) -> None:
        """Look the names up once."""
        for entry in self._named:
            try:
                entry.places, entry.resolved = _places(self._look_up(entry.peer.host)), True
            except (OSError, ValueError) as exc:  # ValueError: no name can be written so
                if entry.resolved or not self._first.is_set():
                    logger.warning(
                        "peer not resolved",
                        extra={
                            "ae_title": entry.peer.ae_title,
                            "host": entry.peer.host,
                            "reason": getattr(exc, "strerror", None) or "no host name",
                        },
                    )
                entry.resolved = False

    def _keep_looking(self) -> None:
        while True:
            try:
                self.refresh()
            except Exception:  # else nobody would ever be looked up again
                logger.exception("peers not resolved")
            self._first.set()
            if self._stop.wait(RESOLVE_S):
                return


def addresses_of(host: str) -> list[str]:
    """Return the addresses of a host name.

    Raises
    ------
    OSError
        If it has none, or nobody answers.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in found]


def _networks(addresses: Iterable[str]) -> list[Network]:
    found: list[Network] = []
    for address in addresses:
        names = ("0.0.0.0/0", "::/0") if address == ANY else (address,)
        found.extend(map(ipaddress.ip_network, names))
    return found


def _places(addresses: Iterable[str]) -> _Places:
    parsed = [parse(address) for address in addresses]
    networks = tuple(dict.fromkeys(ipaddress.ip_network(address) for address in parsed))
    return _Places(networks, any(address.is_loopback or _is_ours(address) for address in parsed))


def _is_ours(address: Address) -> bool:
    """Whether an address is one of this machine: only then can a socket have it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
