"""The try-out page over HTTP: its files, and what its script asks for.

Nothing here is part of the deployed function. Photos stay in this process and, with --log-dir, in that folder.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from defectcam.cvat_labels import labels_with
from defectcam.handler import ModelHandler
from defectcam.image import ImageError
from defectcam.overlay import COLOURS_RGB
from defectcam.paths import repository_file
from defectcam.request import parse_request
from defectcam.serve.files import KINDS, ReviewedSet, download, encoded, measures
from defectcam.serve.photos import LEAST_THETA, STEPS, Cancelled, Gone, Job, Photo, Photos
from defectcam.settings import RequestError, Settings

PAGE = Path(__file__).parent / "page"
SAMPLE = repository_file("docs/sample.jpg")
PROGRESS_S = 0.25  # between two lines about a photo that is read
VIEW_PX = 2048  # longer side of the pictures that the browser gets
MAX_JSON_BYTES = 64 << 20  # of kept shapes
GONE = "this photo is no longer in memory: it is read again"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Run = Callable[..., Awaitable]


class Tryout:
    """The page around one running function.

    Args:
        model: the function's.
        run: `await run(function, *arguments)` calls a function when it is its turn with the networks.
    """

    def __init__(self, model: ModelHandler, run: Run) -> None:
        self.model, self.run, self.photos = model, run, Photos(model)
        self.reviewed = ReviewedSet(model) if model.proposal_log else None

    def app(self) -> Starlette:
        """To be mounted at a path of its own."""
        one = "/photos/{photo}"
        routes = [
            Route("/about", self.about),
            Route("/sample.jpg", lambda request: FileResponse(SAMPLE)),
            Route("/photos", self.read, methods=["POST"]),
            Route(f"{one}/view.jpg", self.view),
            Route(f"{one}/heat.png", self.heat),
            Route(f"{one}/proposals", self.proposals, methods=["POST"]),
            Route(f"{one}/click", self.click, methods=["POST"]),
            Route(f"{one}/finish", self.finish, methods=["POST"]),
            Route("/download/{kind}", self.download, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        errors = (ValueError, TypeError, LookupError, MemoryError, OSError, RuntimeError)
        app = Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, self._refused))

        async def guarded(scope, receive, send):
            """With the page's headers, and not for pages of other sites that the same browser has open."""

            async def send_with_headers(message):
                if message["type"] == "http.response.start":
                    message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                await send(message)

            request = Request(scope)
            from_page = request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
            answer = app if from_page or request.method == "GET" else JSONResponse({"error": "only for its own page"}, 403)
            await answer(scope, receive, send_with_headers)

        return guarded

    async def about(self, request: Request) -> Response:
        """What runs here, as the page needs it."""
        colours = {label["name"]: label.get("color") for label in labels_with(self.model.defects)}
        colours |= {name: "#%02x%02x%02x" % rgb for name, rgb in COLOURS_RGB.items()}
        own = {defect: self.model.effective(defect, self.model.settings) for defect in self.model.defects}
        about = {
            "defects": [{"name": name, "colour": colours[name], **own[name]} for name in self.model.defects],
            "steps": STEPS,
            "least_theta": LEAST_THETA,
            "device": "gpu" if self.model.device == "cuda" else "cpu",
            "log_dir": str(self.reviewed.folder) if self.reviewed else None,
            "sample": SAMPLE.is_file(),
        }
        return JSONResponse(about)

    async def read(self, request: Request) -> Response:
        """Read a photo, the body: lines of JSON tell how far it is; who goes away cancels it."""
        return StreamingResponse(self._lines(await _body(request, self.model.max_pixels * 6)), media_type="application/x-ndjson")

    async def _lines(self, image_bytes: bytes) -> AsyncIterator[str]:
        job, started = Job(), time.monotonic()

        def line(**told: object) -> str:
            return json.dumps({**told, "seconds": round(time.monotonic() - started, 1)}) + "\n"

        try:
            photo = await asyncio.to_thread(self.photos.add, image_bytes)
            height, width = photo.size
            yield line(id=photo.id, width=width, height=height, steps=self._steps(photo))
            for name, work in self.photos.stages(photo, job):
                task = asyncio.ensure_future(self.run(work))
                task.add_done_callback(lambda task: task.cancelled() or task.exception())  # an error after the browser has gone
                while not (await asyncio.wait([task], timeout=PROGRESS_S))[0]:
                    yield line(stage=name, share=round(job.share, 3))
                task.result()
                yield line(stage=name, share=1, steps=self._steps(photo))
            yield line(done=True, steps=self._steps(photo))
        except Cancelled:
            return
        except Exception as error:
            yield line(error=self._sentence(error))
        finally:
            job.cancelled = True

    def _steps(self, photo: Photo) -> list[int]:
        """The T that all defects have been climbed to."""
        return [T for T in STEPS if all(T in photo.steps.get(defect, ()) for defect in self.model.defects)]

    async def view(self, request: Request) -> Response:
        """A part of a photo, ?box=x0,y0,x1,y1 in its px, at VIEW_PX at the most; a JPEG."""
        photo = self._photo(request)

        def picture() -> bytes:
            x0, y0, x1, y1 = (int(number) for number in request.query_params["box"].split(","))
            part = photo.image_rgb[max(y0, 0) : max(y1, 1), max(x0, 0) : max(x1, 1)]
            scale = min(1.0, VIEW_PX / max(part.shape[:2]))
            small = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else part
            return encoded(".jpg", small[:, :, ::-1])

        try:
            return Response(await asyncio.to_thread(picture), media_type="image/jpeg")
        except (KeyError, ValueError, cv2.error):  # cv2: of nothing
            raise RequestError(f"box is {request.query_params.get('box')!r}, but must be x0,y0,x1,y1 in the photo") from None

    async def heat(self, request: Request) -> Response:
        """The map of ?defect= at ?steps= as colours, the surer the less transparent; a PNG of the whole photo."""
        photo, query = self._photo(request), request.query_params
        values = {(defect, str(T)): one for (defect, T), one in photo.heat.items()}.get((query.get("defect"), query.get("steps")))
        if values is None:
            raise RequestError("there is no such map of this photo yet")

        def picture() -> bytes:
            colours = cv2.applyColorMap(values, cv2.COLORMAP_INFERNO)
            return encoded(".png", np.dstack([colours, np.minimum(values * 1.5, 215).astype(np.uint8)]))

        return Response(await asyncio.to_thread(picture), media_type="image/png")

    async def proposals(self, request: Request) -> Response:
        """The function's answers at several T, {"steps": [0, 2], "threshold": ..., "cam_threshold": ..., "defects": ...}."""
        photo, given = self._photo(request), await _json(request)
        steps = given.pop("steps", STEPS)
        settings = self._settings(given)

        def answers() -> dict:
            found = {T: self.photos.shapes(photo, T, settings) for T in steps}
            return {T: [self._shown(photo, shape) for shape in shapes] for T, shapes in found.items()}

        started = time.monotonic()
        answer = await asyncio.to_thread(answers)
        return JSONResponse({"proposals": answer, "seconds": round(time.monotonic() - started, 3)})

    async def click(self, request: Request) -> Response:
        """The outline of the click tool at {"x", "y"}, and settings; T is the deployment's, else 0, as for clicks in CVAT."""
        photo, given = self._photo(request), await _json(request)
        envelope = {"image": "AAAA", "pos_points": [[given.pop("x", None), given.pop("y", None)]], **given}
        click = parse_request(envelope, self.model.settings, self.model.defects)
        answer, defect = await self.run(self.model.outline, photo.image_rgb, click)
        values = {"confidence": "0", "iterations": "0", "proposal": ""}
        shape = {
            "label": defect,
            "type": "polygon",
            "points": [float(value) for point in answer["points"] for value in point],
            "source": "semi-auto",
            "attributes": [{"name": name, "value": value} for name, value in values.items()],
        }
        return JSONResponse(shape | measures(shape, *photo.size))

    async def download(self, request: Request) -> Response:
        """What was kept as a file of a kind, {"photos": [{"id", "name", "width", "height", "shapes"}]}."""
        kind, records = request.path_params["kind"], [_record(one) for one in (await _json(request)).get("photos", ())]
        if kind not in KINDS:
            raise RequestError(f"the kind of file is {kind!r}, but must be one of {', '.join(KINDS)}")
        pictures = {record["id"]: self.photos.get(record["id"]).image_rgb for record in records} if kind == "overlay" else {}
        name, content, media_type = await asyncio.to_thread(download, kind, records, self.model.defects, pictures)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
        return Response(content, media_type=media_type, headers=headers)

    async def finish(self, request: Request) -> Response:
        """Keep a photo that was reviewed to the end in --log-dir: {"name", "shapes", "rejected", "settings"}."""
        photo, given = self._photo(request), await _json(request)
        if not self.reviewed:
            raise RequestError("there is no folder to keep it in: start the page with --log-dir DIR")
        settings, name = self._settings(given.get("settings") or {}), printable(given["name"])
        path = await asyncio.to_thread(self.reviewed.add, photo, name, given["shapes"], given["rejected"], settings)
        return JSONResponse({"kept": str(path)})

    def _photo(self, request: Request) -> Photo:
        return self.photos.get(request.path_params["photo"])

    def _settings(self, given: dict) -> Settings:
        """Settings by the rules of the function's own requests."""
        return parse_request({**given, "image": "AAAA"}, self.model.settings, self.model.defects).settings

    def _shown(self, photo: Photo, shape: dict) -> dict:
        """A proposal with what the page shows of it beside CVAT's fields; the function's tags as they are."""
        if shape["type"] == "tag":
            return shape
        return shape | measures(shape, *photo.size, lambda region: photo.surest_pixel(shape["label"], region))

    def _sentence(self, error: Exception) -> str:
        """An error in words for the person at the page."""
        if isinstance(error, (RequestError, ImageError)):
            return str(error)
        if isinstance(error, OSError):
            return f"cannot write {error.filename}: {error.strerror}"
        if reason := self.model.reason(error):
            return reason
        self.model.logger.error(repr(error))
        return "internal error, see the terminal that the page was started in"

    async def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, Gone):
            return JSONResponse({"error": GONE, "gone": True}, 404)
        return JSONResponse({"error": self._sentence(error)}, 400)


async def _body(request: Request, most_bytes: int) -> bytes:
    """The request's body.

    Raises:
        RequestError: it is longer than that, or its sender has gone.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most_bytes:
                raise RequestError(f"more than {most_bytes >> 20} MB: use a smaller file")
    except ClientDisconnect:
        raise RequestError("it was not sent to its end") from None
    return bytes(body)


async def _json(request: Request) -> dict:
    try:
        given = json.loads(await _body(request, MAX_JSON_BYTES))
    except ValueError as error:
        raise error if isinstance(error, RequestError) else RequestError("the body must be JSON") from None
    if not isinstance(given, dict):
        raise RequestError("the body must be a JSON object")
    return given


def _record(given: dict) -> dict:
    """A photo of the page as the writers of files take it."""
    return {**given, "name": printable(given["name"])}


def printable(name: str) -> str:
    """A file's name without what XML and terminals cannot have."""
    return "".join(char if char.isprintable() else "_" for char in name)
