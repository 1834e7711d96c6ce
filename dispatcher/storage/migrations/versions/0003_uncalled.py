"""Deliveries say that the callback of an attempt has not been called yet.

Programs from before this revision may work beside it. They count each begin (`begins`) and do not write the new column,
so that an attempt of theirs is never taken for one whose callback was not called.

On MySQL and MariaDB each change of a table commits, so an interrupted upgrade may have added the column.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_DELIVERY = "chain_dispatcher_delivery"


def upgrade() -> None:
    if "uncalled" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns(_DELIVERY)}:
        op.add_column(_DELIVERY, sa.Column("uncalled", sa.Integer()))


def downgrade() -> None:
    op.drop_column(_DELIVERY, "uncalled")
