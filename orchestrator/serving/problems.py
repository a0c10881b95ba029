"""Errors, which have one shape everywhere: that of OpenAI's API."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from orchestrator.serving.messages import Failure

AWAY = (RayActorError, RayServeException)
"""What is raised where the directory is not there."""


class Problem(HTTPException):
    """What a request cannot have, with a code for programs and a sentence for people."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"message": str(self.detail), "type": kind, "param": self.param, "code": self.code}

    def failure(self, request_id: str | None = None) -> Failure:
        """The same over WebSocket."""
        return Failure(code=self.code, message=str(self.detail), param=self.param, request_id=request_id)


async def _answer(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = Problem(
            422, "invalid_value", f"{first['loc'][-1]}: {first['msg']}.", param=str(first["loc"][-1])
        )
    elif isinstance(error, AWAY):
        error = Problem(503, "unavailable", "a part of the server is being restarted.", Retry_After="5")
    elif not isinstance(error, Problem):
        assert isinstance(error, HTTPException)
        headers = {name: value for name, value in (error.headers or {}).items()}
        error = Problem(error.status_code, "error", str(error.detail), **headers)
    return JSONResponse({"error": error.body}, error.status_code, error.headers)


def install(app: FastAPI) -> None:
    """Have `app` answer every error in the one shape."""
    for kind in (HTTPException, RequestValidationError, *AWAY):
        app.add_exception_handler(kind, _answer)
