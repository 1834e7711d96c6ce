"""What operators did to chain types and resources: who, why and when. On the caller's connection; nothing here commits.

Acts on chains and deliveries stand in the chains' histories.
"""

from datetime import datetime
from typing import Final

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from dispatcher.domain.records import MAX_DETAIL, ActionRecord
from dispatcher.domain.resources import Resource, resource_key
from dispatcher.states import OperatorAction, SubjectKind
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import ACTION

_FIELDS: Final = tuple(ActionRecord.__dataclass_fields__)


def resource_subject(resource: Resource) -> str:
    """How a resource is named as the subject of an action: no other resource has the same name."""
    kind = resource[0].replace("%", "%25").replace("=", "%3D")
    return f"{kind}={resource[1]}"


def erased_subject(resource: Resource) -> str:
    """How an erased resource is named: by a digest, so that the row can be found by whoever knows the resource.

    A short id can be found out from its digest, by trying all ids.
    """
    return f"sha256:{resource_key([resource])}"


def add(
    connection: Connection,
    kind: SubjectKind,
    subject: str,
    action: OperatorAction,
    *,
    requested_by: str | None,
    reason: str | None,
) -> None:
    """Note an action, as of now by the database's clock."""
    connection.execute(
        insert(ACTION).values(
            subject_kind=kind,
            subject=subject,
            action=action,
            requested_by=requested_by,
            reason=reason[:MAX_DETAIL] if reason else None,
            created_at=clock_plus(0),
        )
    )


def listing(
    connection: Connection, *, type_name: str | None = None, resource: Resource | None = None, limit: int
) -> list[ActionRecord]:
    """The actions on this chain type and this resource (None: on any), newest first, at most `limit`."""
    query = select(*(ACTION.c[name] for name in _FIELDS))
    if type_name is not None:
        query = query.where(ACTION.c.subject_kind == SubjectKind.TYPE, ACTION.c.subject == type_name)
    if resource is not None:
        subjects = [resource_subject(resource), erased_subject(resource)]
        query = query.where(ACTION.c.subject_kind == SubjectKind.RESOURCE, ACTION.c.subject.in_(subjects))
    rows = connection.execute(query.order_by(ACTION.c.id.desc()).limit(limit)).mappings()
    return [ActionRecord(**row) for row in rows]


def forget_resource(connection: Connection, resource: Resource) -> None:
    """Delete what was noted about a resource, because its id, or a reason, may be personal data."""
    connection.execute(
        delete(ACTION).where(
            ACTION.c.subject_kind == SubjectKind.RESOURCE, ACTION.c.subject == resource_subject(resource)
        )
    )


def prune(connection: Connection, *, before: datetime, limit: int) -> int:
    """Delete a batch of actions older than `before` (machine time); how many."""
    old = select(ACTION.c.id).where(ACTION.c.created_at < before).order_by(ACTION.c.created_at, ACTION.c.id)
    ids = connection.execute(old.limit(limit)).scalars().all()
    if ids:
        connection.execute(delete(ACTION).where(ACTION.c.id.in_(sorted(ids))))
    return len(ids)
