"""The secret that a store's keys are made with. The store has its fingerprint, so that another one is noticed, under
which no key would be valid."""

from sqlalchemy import select, update

from buddy_server.clock import now_ms
from buddy_server.errors import ConfigError
from buddy_server.tenancy.keys import KeySecret, secret_file
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.tables import keys, revision


async def check_secret(database: Database, secret: KeySecret, *, may_replace: bool) -> None:
    """The first secret becomes that of the store. `may_replace` is for a server, which takes up another one while no
    key of the store is valid; a command must not, as the keys that it makes are for a server with the old one.

    Raises ConfigError if the store's secret is another, and StoreUnreachable.
    """
    valid = keys.c.revoked_ms.is_(None) & (keys.c.expires_ms.is_(None) | (keys.c.expires_ms > now_ms()))
    async with database.writing() as connection:
        # Locked, as changes to keys lock it.
        query = select(revision.c.secret_fingerprint).with_for_update()
        known = (await connection.execute(query)).scalar_one()
        if known == secret.fingerprint:
            return
        has_keys = (await connection.execute(select(keys.c.id).where(valid).limit(1))).first() is not None
        if known is not None and (has_keys or not may_replace):
            raise ConfigError(_refusal(database))
        await connection.execute(update(revision).values(secret_fingerprint=secret.fingerprint))


def _refusal(database: Database) -> str:
    places = "BUDDY_KEY_SECRET to it, or BUDDY_KEY_SECRET_FILE to a file that has it"
    if database.sqlite_file is not None:
        places += f"; with neither set, {secret_file(database.sqlite_file)} must have it"
    return (
        f"the keys of this store are made with another secret: set {places}. If it is lost, revoke all keys: "
        "the next server that starts then takes up the new one"
    )
