"""The application: routes, what they share, and the layers around them."""

import contextlib
from collections.abc import AsyncIterator

import anyio.to_thread
from fastapi import FastAPI
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.types import ASGIApp

from dicomnode import manifest
from dicomnode.audit import AuditLog
from dicomnode.config import Settings
from dicomnode.core import region
from dicomnode.objects.modules import VERSION
from dicomnode.web import coverage, deliveries, docs, health, look, problem, series, studies
from dicomnode.web.access import Doorkeeper
from dicomnode.web.answer import API
from dicomnode.web.bounds import Bounds, Refusals
from dicomnode.web.database import Database
from dicomnode.web.pages import pages, tiles
from dicomnode.web.part import Part
from dicomnode.web.patients import PatientKeys, secret_of
from dicomnode.web.session import Sessions

# At a time; fewer than the connections of the database's pool, 15.
THREADS = 12
GZIP_BYTES = 1024  # what is shorter goes as it is
ABOUT = """
Body-height curves of CT Series, and the offsets that align Studies: `z_fixed = z_moving +
offset_mm`. Patients are addressed by an opaque key, never by their Patient ID. Not a medical
device.
"""


def create(settings: Settings) -> tuple[FastAPI, ASGIApp, Refusals]:
    """Return the application, the same within its bounds, and what refusals are told to.

    Raises
    ------
    ConfigError
        If the token file or the key file cannot be used.
    WeightsError
        If there is no weight bundle to take the names of regions from.
    """
    audit = AuditLog(settings.audit_log)
    database = Database(settings.database.url)
    bundle = manifest.read_manifest(settings.score.model)
    secret = secret_of(settings.patient_key_file)
    part = Part(
        settings=settings,
        database=database,
        audit=audit,
        keys=PatientKeys(secret),
        doorkeeper=Doorkeeper(settings.web, Sessions(secret)),
        regions=region.from_manifest(bundle),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        database.close()
        audit.close()

    app = FastAPI(
        title="dicomnode",
        version=VERSION,
        description=ABOUT,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,  # theirs load from a CDN
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.part = part
    app.state.readiness = health.Checks()
    app.state.queue, app.state.held = tiles.queue(), tiles.held()
    problem.install(app)
    app.include_router(health.router)
    app.include_router(docs.router)
    app.include_router(look.router)
    for routes in (series, studies, coverage, deliveries):
        app.include_router(routes.router)
    for routes in pages:
        app.include_router(routes)
    app.add_middleware(
        GZipMiddleware,
        minimum_size=GZIP_BYTES,
        compresslevel=4,
        exclude_content_types=(*DEFAULT_EXCLUDED_CONTENT_TYPES, coverage.PARQUET),
    )
    refusals = Refusals(audit)
    return app, Bounds(app, settings.web.names, refusals), refusals
