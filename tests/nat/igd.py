"""An Internet Gateway Device, as home routers are: says where it is (SSDP) and what it is (XML), opens ports (SOAP).

In a test it listens on loopback and writes down what is asked. As a program, `python -m tests.nat.igd INNER_IP
OUTER_IP`, it is the router's part of the lab: every port that it opens is a rule of that network namespace's nftables.
"""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

SSDP = ("239.255.255.250", 1900)
DEVICE = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>
<device><deviceType>{DEVICE}</deviceType><friendlyName>a router</friendlyName><UDN>uuid:1</UDN><deviceList>
<device><deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><UDN>uuid:2</UDN><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<serviceId>urn:upnp-org:serviceId:WANCommonIFC1</serviceId><controlURL>/common</controlURL>
<eventSubURL>/common/events</eventSubURL><SCPDURL>/common.xml</SCPDURL></service></serviceList><deviceList>
<device><deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><UDN>uuid:3</UDN><serviceList>
<service><serviceType>{SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<controlURL>/control</controlURL><eventSubURL>/events</eventSubURL><SCPDURL>/wanip.xml</SCPDURL></service>
</serviceList></device></deviceList></device></deviceList></device></root>"""

Mapping = tuple[str, int]


class SoapError(Exception):
    """A UPnP error, by its number."""


@dataclass
class Router:
    """Use as a context manager. What it knows and does is in its attributes; change them between two questions."""

    outside: str = "1.2.3.4"
    """Its outer address, as it says."""
    refuses: int = 0
    """The UPnP error that opening a port meets; 0: none."""
    garbage: bool = False
    """Answers with something else than XML."""
    inner: str = "127.0.0.1"
    rules: bool = False
    """Open ports with nft."""
    ports: dict[int, Mapping] = field(default_factory=dict)
    leases: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(200, "no XML at all <<<" if router.garbage else DESCRIPTION)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if router.garbage:
                    self._say(200, "no XML at all <<<")
                    return
                action = self.headers["SOAPAction"].strip('"').rpartition("#")[2]
                said = dict(re.findall(r"<(New\w+)>([^<]*)</", body))
                try:
                    values = router.answer(action, said)
                except SoapError as error:
                    detail = f"<UPnPError><errorCode>{error}</errorCode></UPnPError>"
                    self._say(500, _envelope(f"<s:Fault><detail>{detail}</detail></s:Fault>"))
                    return
                fields = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
                self._say(200, _envelope(f'<u:{action}Response xmlns:u="{SERVICE}">{fields}</u:{action}Response>'))

            def _say(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "text/xml")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer((self.inner, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://{self.inner}:{self._server.server_address[1]}/description.xml"

    def answer(self, action: str, said: dict[str, str]) -> dict[str, object]:
        """What a SOAP action returns. Raises SoapError."""
        port = int(said.get("NewExternalPort", 0))
        if action == "GetStatusInfo":
            return {"NewConnectionStatus": "Connected", "NewLastConnectionError": "ERROR_NONE", "NewUptime": 1}
        if action == "GetExternalIPAddress":
            return {"NewExternalIPAddress": self.outside}
        if action == "GetSpecificPortMappingEntry":
            if port not in self.ports:
                raise SoapError(714)  # NoSuchEntryInArray
            host, inner_port = self.ports[port]
            return {"NewInternalPort": inner_port, "NewInternalClient": host, "NewEnabled": 1, "NewLeaseDuration": 1}
        if action == "AddPortMapping":
            if self.refuses:
                raise SoapError(self.refuses)
            self.ports[port] = (said["NewInternalClient"], int(said["NewInternalPort"]))
            self.leases.append(int(said["NewLeaseDuration"]))
            self._write_rules()
            return {}
        if action == "DeletePortMapping":
            self.ports.pop(port, None)
            self._write_rules()
            return {}
        raise SoapError(401)

    def _write_rules(self) -> None:
        if self.rules:
            lines = [
                f'iifname "out" tcp dport {port} dnat to {host}:{inner}' for port, (host, inner) in self.ports.items()
            ]
            program = "\n".join(
                [
                    "flush chain ip home incoming",
                    *(f"add rule ip home incoming {line}" for line in lines),
                    "add rule ip home through ct status dnat accept",
                ]
            )
            subprocess.run(["nft", "-f", "-"], input=program, text=True, check=True)

    def be_found(self) -> None:
        """Answer whoever looks for a router, for ever."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asked.bind(("", SSDP[1]))
            group = struct.pack("4s4s", socket.inet_aton(SSDP[0]), socket.inet_aton(self.inner))
            asked.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            while True:
                question, who = asked.recvfrom(2048)
                if question.startswith(b"M-SEARCH") and DEVICE.encode() in question:
                    answer = (
                        "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nEXT:\r\n"
                        f"LOCATION: {self.url}\r\nST: {DEVICE}\r\nUSN: uuid:1::{DEVICE}\r\n\r\n"
                    )
                    asked.sendto(answer.encode(), who)


def _envelope(body: str) -> str:
    return (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/">'
        f"<s:Body>{body}</s:Body></s:Envelope>"
    )


if __name__ == "__main__":
    inner, outer = sys.argv[1:]
    with Router(outside=outer, inner=inner, rules=True) as the_router:
        print('{"ready": true}', flush=True)
        the_router.be_found()
