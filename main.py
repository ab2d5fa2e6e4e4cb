"""The Nuclio function: `init_context` once per worker, `handler` per request. Envelope in, JSON out."""

import json
import os
import traceback
from datetime import datetime, timezone

from defectcam.interactor import to_json
from defectcam.memory import limit_memory
from defectcam.request import RequestError, parse_request
from model_handler import ModelHandler

LONGEST_WAIT_S = 3600  # no queue is longer: a time of arrival before that is a clock's mistake


def init_context(context):
    """Verify and load the weights; an error here stops the start and says which file and why."""
    context.user_data.model = ModelHandler.from_env(os.environ, context.logger)
    if context.user_data.model.device == "cpu":  # CUDA reserves far more than it uses
        limit_memory()
    context.logger.info(f"ready: {json.dumps(context.user_data.model.describe())}")


def handler(context, event):
    """GET: what runs here. Anything else: the proposals for the image in the body, or with `pos_points` the outline
    that was clicked, as CVAT wants them."""
    model = context.user_data.model
    if event.method == "GET":
        return _response(context, 200, model.describe())
    request = None
    try:
        request = parse_request(event.body, model.settings, model.defects)
        answer = model.answer(request, waited_s(event.timestamp))
        return _response(context, 200, answer, to_json if request.clicks else _json)
    except RequestError as error:
        context.logger.warn(f"refused: {error}")
        return _response(context, 400, {"error": str(error)})
    except Exception as error:  # while parsing or writing JSON as well: memory may end anywhere
        context.logger.error(traceback.format_exc())
        reason = model.reason(error) or "internal error, see the function's log"
        # A frame must never cost CVAT's whole run: say so on it, go on with the next. A click costs nothing.
        if request and request.clicks:
            return _response(context, 500, {"error": reason})
        return _response(context, 200, model.unprocessed(reason))


def waited_s(arrival: object) -> float:
    """Seconds since an event's arrival, which the processor stamps before the queue; 0 where that cannot be.

    Args:
        arrival: nuclio_sdk's `event.timestamp`: UTC without saying so, cut to whole seconds; 0 where there is none.
    """
    if not isinstance(arrival, datetime):
        return 0.0
    arrival = arrival if arrival.tzinfo else arrival.replace(tzinfo=timezone.utc)
    seconds = (datetime.now(timezone.utc) - arrival).total_seconds()
    return seconds if 0 <= seconds < LONGEST_WAIT_S else 0.0


def _json(answer):
    return json.dumps(answer, allow_nan=False, separators=(",", ":"))  # masks are millions of numbers


def _response(context, status, answer, to_text=_json):
    return context.Response(
        body=to_text(answer),
        headers={},
        content_type="application/json",
        status_code=status,
    )
