"""Django with a database on the mount: migrations, its own models, sessions and the test client.

    django_site.py write DATABASE delete|wal    works with the database, prints what it holds
    django_site.py read DATABASE delete|wal     prints what it holds, and must not be able to write
"""

import sys

import django
from django.conf import settings
from django.core.management import call_command
from django.db import OperationalError, connection, transaction

mode, path, journal = sys.argv[1:]
# A write on a replica in WAL mode is refused as "database is locked", which is waited for.
TIMEOUT = 10 if mode == "write" else 0.2

settings.configure(
    SECRET_KEY="of a test",
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": path,
            "OPTIONS": {"timeout": TIMEOUT},
        }
    },
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
    ],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    USE_TZ=True,
)
django.setup()

from django.contrib.auth.models import Group, User  # noqa: E402
from django.contrib.sessions.backends.db import SessionStore  # noqa: E402
from django.contrib.sessions.models import Session  # noqa: E402


def summary():
    names = User.objects.order_by("username").values_list("username", "groups__name")
    return list(names), Session.objects.get().get_decoded()


def write():
    call_command("migrate", verbosity=0)
    group = Group.objects.create(name="writers")
    for n in range(20):
        user = User.objects.create_user(f"user{n}", password="secret")
        user.groups.add(group)
    try:
        with transaction.atomic():
            User.objects.filter(username="user0").delete()
            raise KeyError
    except KeyError:
        pass
    with transaction.atomic():
        User.objects.filter(username="user1").update(first_name="One")
        try:
            with transaction.atomic():
                User.objects.create_user("user2")
        except django.db.IntegrityError:
            pass
        User.objects.filter(username="user3").delete()
    session = SessionStore()
    session["visits"] = 7
    session.save()
    assert User.objects.get(first_name="One").check_password("secret")


def refused():
    try:
        User.objects.create_user("refused")
    except OperationalError as error:
        print("refused:", error)
        return
    sys.exit("a write on a replica was not refused")


if mode == "write":
    with connection.cursor() as cursor:
        cursor.execute(f"PRAGMA journal_mode={journal}")
    write()
    print(summary())
else:
    found = summary()
    refused()
    print(found)
