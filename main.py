"""The Nuclio function: `init_context` once per worker, `handler` per request. Envelope in, JSON out."""

import json
import os
import traceback

from defectcam.request import RequestError, parse_request
from model_handler import ModelHandler


def init_context(context):
    """Verify and load the weights; an error here stops the start and says which file and why."""
    context.user_data.model = ModelHandler.from_env(os.environ, context.logger)
    context.logger.info(f"ready: {json.dumps(context.user_data.model.describe())}")


def handler(context, event):
    """GET: what runs here. Anything else: the proposals for the image in the body, or with `pos_points` the outline
    that was clicked, as CVAT wants them."""
    model = context.user_data.model
    status = 200
    if event.method == "GET":
        answer = model.describe()
    else:
        try:
            request = parse_request(event.body, model.settings, model.defects)
            answer = model.answer(request)
        except RequestError as error:
            status, answer = 400, {"error": str(error)}
            context.logger.warn(f"refused: {error}")
        except Exception:
            context.logger.error(traceback.format_exc())
            reason = "internal error, see the function's log"
            # A frame must never cost CVAT's whole run: say so on it, go on with the next. A click costs nothing.
            status, answer = (500, {"error": reason}) if request.clicks else (200, model.unprocessed(reason))
    return context.Response(
        body=json.dumps(answer, allow_nan=False, separators=(",", ":")),  # masks are millions of numbers
        headers={},
        content_type="application/json",
        status_code=status,
    )
