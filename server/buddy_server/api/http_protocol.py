"""HTTP as uvicorn parses it; what it cannot parse gets an error in the API's format."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from buddy_server.api.errors_handler import render_error
from buddy_server.errors import InvalidRequest


class HttpProtocol(HttpToolsProtocol):
    def send_400_response(self, msg: str) -> None:
        response = render_error(InvalidRequest(f"This is not valid HTTP: {msg}"))
        fields = [*response.raw_headers, (b"connection", b"close")]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(response.body))
        self.transport.close()
