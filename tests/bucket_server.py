"""The bucket emulator as a program, with two features of real buckets that it lacks and TensorStore needs: the
generation of an object together with its content, and conditional writes and deletions.

To test failures, `PUT /_read_only/BUCKET` makes a bucket read-only, and `DELETE` makes it writable again. `GET` of
that path succeeds once a write of a checkpoint file has been refused.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

_CHANGES = ("POST", "PUT", "PATCH", "DELETE")
_SWITCH = "/_read_only/"
_read_only: set[str] = set()
_refused_checkpoints: set[str] = set()
_download = objects.download


def _download_with_generation(request, response, storage):
    _download(request, response, storage)
    if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
        response["x-goog-metageneration"] = found["metageneration"]


def _name(request) -> str:
    """Returns the name of the object in a request."""
    return (request.params or {}).get("object_id") or (request.query.get("name") or [""])[0]


def _generation(storage, request) -> str:
    """Returns the generation of the object in a request, "0" if it does not exist."""
    found = storage.objects.get((request.params or {}).get("bucket_name", ""), {}).get(_name(request))
    return found["generation"] if found else "0"


class Router(server.Router):
    """Answers refused requests, and leaves the others to the emulator."""

    def handle(self, method):
        refusal = self._refusal(method, server.Request(self._request_handler, method))
        if refusal is None:
            return super().handle(method)
        response = server.Response(self._request_handler)
        response.status = refusal
        response.json({"error": {"code": refusal.value, "message": refusal.phrase}})
        response.close()

    def _refusal(self, method, request):
        if request.path.startswith(_SWITCH):
            bucket = request.path.removeprefix(_SWITCH)
            if method == "GET":
                return HTTPStatus.OK if bucket in _refused_checkpoints else HTTPStatus.NOT_FOUND
            (_read_only.add if method == "PUT" else _read_only.discard)(bucket)
            return HTTPStatus.OK
        for regex, _ in server.HANDLERS:
            if match := server.re.fullmatch(regex, request.path):
                request.set_match(match)
                break
        else:
            return None
        if method in _CHANGES and (request.params or {}).get("bucket_name") in _read_only:
            self._request_handler.rfile.read(int(request.get_header("Content-Length", 0)))
            if method != "DELETE" and "/checkpoints/" in _name(request):  # deletion rights are separate
                _refused_checkpoints.add(request.params["bucket_name"])
            return HTTPStatus.FORBIDDEN
        return self._unmet(method, request)

    def _unmet(self, method, request):
        """Returns the status if a precondition of the request is not met, else None."""
        generation = _generation(self._request_handler.storage, request)
        (wanted,), (known,) = (request.query.get(f"ifGeneration{kind}", [None]) for kind in ("Match", "NotMatch"))
        if wanted is not None and wanted != generation:
            self._request_handler.rfile.read(int(request.get_header("Content-Length", 0)))
            return HTTPStatus.PRECONDITION_FAILED
        if method == "GET" and known is not None and known == generation:
            return HTTPStatus.NOT_MODIFIED if generation != "0" else None
        return None


def main(port: int) -> None:
    objects.download = _download_with_generation
    routes = [(regex, {**handlers}) for regex, handlers in server.HANDLERS]
    for _, handlers in routes:
        handlers.update({method: objects.download for method, found in handlers.items() if found is _download})
    server.HANDLERS = tuple(routes)
    server.Router = Router
    server.create_server("localhost", port, in_memory=True).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
