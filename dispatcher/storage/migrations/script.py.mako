"""${message}

Expand or contract, never both in one release: workers of the release before go on running on the new tables.
SQLite keeps foreign keys on: copying a table there (`batch_alter_table`) would delete what refers to it.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
