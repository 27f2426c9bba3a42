"""The s3 transport under the real download loop, against a service that checks signatures (OpenStack Swift)."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from anchor_build import cmdline, paramtypes
from contrib.site import pki
from tests.shell import conftest as shells
from tests.shell.conftest import Shell
from tests.shell.downloads import DATA, DIGEST, OTHER
from tests.stages import disk_node, https_node, s3_node
from tests.stages import hostile_http as fake
from tests.stages.hostile_http import hostile
from tests.stages.s3_node import DOMAIN, KEYS, STAGE, S3Node, S3Site, presigned
from tests.stages.test_transport_https import recording_curl

# Fixtures
shell = shells.shell
s3, s3_dash, s3_site = s3_node.s3, s3_node.s3_dash, s3_node.s3_site


def error(code: str, more: str = "", message: str = "No.") -> bytes:
    """Return an error document as S3 writes it."""
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'
    )
    return text.encode()


def test_a_signature_is_that_of_amazons_example(shell: Shell) -> None:
    # https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, Example: GET Object
    done = shell.run(
        '. "$STAGE/anchor-s3.sh"; anchor_s3_sign examplebucket.s3.amazonaws.com /test.txt 20130524T000000Z "$@" && '
        "printf '%s' \"$anchor_s3_authorization\"",
        *("range:bytes=0-9", f"x-amz-content-sha256:{hashlib.sha256().hexdigest()}", "x-amz-date:20130524T000000Z"),
        env={
            "STAGE": str(STAGE),
            "anchor_s3__key": "AKIAIOSFODNN7EXAMPLE",
            "anchor_s3__secret": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "anchor_s3_region": "us-east-1",
        },
    )
    assert done.stdout == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("/a%20b+c", "/a%20b%2Bc"),
        ("/%c3%a9%41%7e%2f", "/%C3%A9A~/"),
        ("/(x)!*'&=;:@$,-._~09azAZ", "/%28x%29%21%2A%27%26%3D%3B%3A%40%24%2C-._~09azAZ"),
        ("".join(f"%{n:02x}" for n in range(1, 256)), quote(bytes(range(1, 256)), safe="/~")),
    ],
)
def test_a_path_has_one_canonical_form(shell: Shell, path: str, canonical: str) -> None:
    script = '. "$STAGE/anchor-s3.sh"; anchor_s3_path "$1" && printf "%s" "$anchor_s3_path"'
    assert shell.run(script, path, env={"STAGE": str(STAGE)}).stdout == canonical


def test_an_image_comes_signed_over_tls(s3: S3Node) -> None:
    assert s3.got(s3.get(sha256=DIGEST))
    assert s3.site.requests() == ["GET /images/node.squashfs 200"]


@pytest.mark.parametrize("key", KEYS)
def test_any_key_can_be_fetched(s3_dash: S3Node, key: str) -> None:
    assert s3_dash.got(s3_dash.get(f"s3://images/{quote(key)}"))


def test_a_key_may_stand_in_the_url_as_urls_allow_it(s3_dash: S3Node) -> None:
    assert s3_dash.got(s3_dash.get("s3://images/a%20b+c.img"))
    assert s3_dash.got(s3_dash.get("s3://images/(all)!*'&=;:@$,%7e_-.img"))


def test_virtual_host_style(s3: S3Node, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"127.0.0.1 images.{DOMAIN}\n")
    setup = f"mount --bind '{tmp_path}/hosts' /etc/hosts || exit 9\n"
    endpoint = f"https://{DOMAIN}:{s3.site.s3.port}"
    done = s3.get("s3://images/a%20b%2Bc.img", setup=setup, endpoint=endpoint, style="virtual", unshare=("--mount",))
    assert s3.got(done)
    assert s3.site.requests() == ["GET /a%20b%2Bc.img 200"]


@pytest.mark.parametrize(
    ("url", "parameters", "host"),
    [
        ("s3://images/k", {}, "images.s3.us-east-1.amazonaws.com"),
        ("s3://images/k", {"style": "path", "region": "eu-west-3"}, "s3.eu-west-3.amazonaws.com"),
        ("s3://images/k", {"region": "cn-north-1"}, "images.s3.cn-north-1.amazonaws.com.cn"),
        ("s3://my.images/k", {}, "s3.us-east-1.amazonaws.com"),
    ],
)
def test_without_an_endpoint_it_is_aws_in_the_region(
    s3_dash: S3Node, url: str, parameters: dict[str, str], host: str
) -> None:
    # No network: the message names the host that was looked for.
    chosen = {"endpoint": "", "region": "us-east-1", **parameters}
    done = s3_dash.get(url, fetch={"attempts": 1}, unshare=("--net",), given=chosen)
    assert s3_dash.failed(done, f"https://{host}/", "the name is not known")


def test_credentials_of_auth_go_before_those_of_the_build(s3: S3Node) -> None:
    service = s3.site.s3
    (s3.credentials / "s3").write_text(f"access_key={service.access_key}\nsecret_key={service.secret_key}\n")
    assert s3.got(s3.get(access_key="OTHER", secret_key="wrong"))  # noqa: S106 - nobody's key


@pytest.mark.parametrize("text", ["access_key=A\n", "secret_key=S\n", "access_key=a b\nsecret_key=S\n", "", "x=y\n"])
def test_credentials_that_are_not_whole_are_refused(s3_dash: S3Node, text: str) -> None:
    (s3_dash.credentials / "s3").write_text(text)
    words = "neither access_key=" if text == "x=y\n" else "are not whole"
    assert s3_dash.failed(s3_dash.get(), words, "run/anchor/credentials/s3")
    assert s3_dash.site.requests() == []


@pytest.mark.parametrize(
    ("url", "parameters", "messages"),
    [
        ("", {"secret_key": "wrong"}, ["SignatureDoesNotMatch", "the access key is AKIAROBOT: is the secret key"]),
        ("", {"access_key": "AKIANOBODY"}, ["status 403", "AKIANOBODY"]),
        ("", {"access_key": "", "secret_key": ""}, ["this node has no access key"]),
        ("", {"region": "us-west-2"}, ["AuthorizationHeaderMalformed", "rd.anchor.s3.region=eu-north-1"]),
        ("s3://images/nothing", {}, ["status 404, NoSuchKey", "check the key in the URL"]),
        ("s3://nobucket/key", {}, ["status 404, NoSuchBucket", "check the bucket in the URL"]),
    ],
)
def test_what_the_service_refuses_is_explained(
    s3_dash: S3Node, url: str, parameters: dict[str, str], messages: list[str]
) -> None:
    assert s3_dash.failed(s3_dash.get(url or "s3://images/node.squashfs", given=parameters), *messages)
    assert s3_dash.attempts() == 1


def test_a_wrong_clock_is_named_with_both_times(s3: S3Node) -> None:
    setup = 'date() { [ "$2" != +%Y%m%dT%H%M%SZ ] || set -- -u -d "-20 min" "$2"; command date "$@"; }\n'
    done = s3.get(setup=setup)
    assert s3.failed(done, "RequestTimeTooSkewed", "this node's clock says 20", "the server's ", "rd.anchor.clock.ntp=")


def test_secrets_reach_neither_arguments_nor_a_traced_log(s3: S3Node, tmp_path: Path) -> None:
    service = s3.site.s3
    path = recording_curl(tmp_path / "bin")
    done = s3.get(env={"PATH": path}, session_token="t0ken/+=", trace=True)  # noqa: S106 - a test's
    assert s3.got(done)
    config = (tmp_path / "bin/config").read_text()
    assert 'header = "x-amz-security-token: t0ken/+="' in config
    assert "SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token," in config
    assert (tmp_path / "bin/modes").read_text() == "600\n"
    assert "+ anchor_fetch" in done.stderr
    arguments = (tmp_path / "bin/arguments").read_text()
    signature = config.split("Signature=")[1][:64]
    kept = "".join(p.read_text() for p in (s3.shell.root / "run").rglob("*") if p.is_file() and p != s3.image)
    for text in (arguments, kept, done.stderr):
        assert text
        assert [word for word in (service.secret_key, "t0ken", signature) if word in text] == []


def test_a_broken_transfer_goes_on_where_it_stopped(s3: S3Node, tmp_path: Path) -> None:
    path = recording_curl(tmp_path / "bin", "--limit-rate 1M --max-time 1")
    assert s3.got(s3.get(env={"PATH": path}))
    assert s3.attempts() == 2
    assert [line.split()[-1] for line in s3.site.requests()] == ["200", "206"]


def test_an_object_that_changes_half_way_is_never_mixed(s3_dash: S3Node, tmp_path: Path) -> None:
    s3_dash.site.put("changing", DATA)
    (tmp_path / "other").write_bytes(OTHER)
    path = recording_curl(tmp_path / "bin", "--limit-rate 1M --max-time 1")
    # The wait before the second attempt is when the object is replaced.
    replace = tmp_path / "bin/sleep"
    service = s3_dash.site.s3
    replace.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/replaced ] || [ ! -e {tmp_path}/bin/called ] || {{ : >{tmp_path}/replaced\n"
        f"{https_node.CURL} -sf --cacert {service.ca} --aws-sigv4 aws:amz:{service.region}:s3 "
        f"-H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' --user '{service.access_key}:{service.secret_key}' "
        f"-T {tmp_path}/other "
        f'{service.endpoint}/images/changing; }}\nexec /bin/sleep "$@"\n'
    )
    replace.chmod(0o755)
    done = s3_dash.get("s3://images/changing", env={"PATH": path})
    assert s3_dash.got(done, OTHER)
    assert "the file changed on the server" in done.stderr


# --- What Swift cannot be made to say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        (
            fake.status(301, {"x-amz-bucket-region": "ap-south-1"}, error("PermanentRedirect")),
            ["301, PermanentRedirect", "rd.anchor.s3.region=ap-south-1"],
        ),
        (fake.status(301, {"x-amz-bucket-region": "ap-south-1"}, b""), ["rd.anchor.s3.region=ap-south-1"]),
        (
            fake.status(301, {}, error("PermanentRedirect", "<Endpoint>b.s3.example</Endpoint>")),
            ["names another host for this bucket, b.s3.example", "rd.anchor.s3.endpoint"],
        ),
        (fake.status(400, {}, error("ExpiredToken")), ["400, ExpiredToken: No.", "the session token is too old"]),
        (fake.status(403, {}, error("InvalidObjectState")), ["the object is archived"]),
        (fake.status(403, {}, error("AccessDenied")), ["AKIAROBOT: may it read this object?"]),
        (fake.status(403, {}, error("NewReason")), ["403, NewReason: No.", "see the log of the S3 service"]),
        (fake.status(403, {}, b"<h1>proxy</h1>"), ["status 403: this node may not have it"]),
        (fake.status(403, {}, error("$(id)`id`;", message="\x1b[2J\x07")), ["status 403: this node may not have it"]),
        (fake.status(403, {}, error("AccessDenied", message="x" * 60_000)), ["403, AccessDenied: " + "x" * 300 + "\n"]),
        (fake.status(403, {}, error("AccessDenied", message="x" * 90_000)), ["status 403: this node may not have it"]),
        (fake.status(403, {}, error("AccessDenied", message="\x1b[2Jclear")), ["AccessDenied: ", "[2Jclear"]),
    ],
)
def test_refusals_of_other_services(s3_dash: S3Node, fault: fake.Fault, messages: list[str]) -> None:
    tls = pki.issue(s3_dash.site.authority, s3_dash.site.directory, "fake")
    with hostile(fault, tls=tls) as server:
        done = s3_dash.get(endpoint=server.url("", "https"))
        assert s3_dash.failed(done, *messages)
        assert "\x1b" not in done.stderr
        assert len(server.requests) <= 2


@pytest.mark.parametrize(
    ("page", "from_auth", "rejected"),
    [
        (b"", True, True),
        (b"<h1>proxy</h1>", True, True),
        (error("InvalidAccessKeyId"), True, True),
        (error("AccessDenied"), True, False),
        (b"", False, False),
        (error("InvalidAccessKeyId"), False, False),
    ],
)
def test_credentials_of_auth_that_are_refused_are_not_kept(
    s3_dash: S3Node, page: bytes, from_auth: bool, rejected: bool
) -> None:
    if from_auth:
        (s3_dash.credentials / "s3").write_text("access_key=A\nsecret_key=B\n")
    tls = pki.issue(s3_dash.site.authority, s3_dash.site.directory, "fake")
    with hostile(fake.status(403, {}, page), tls=tls) as server:
        assert s3_dash.failed(s3_dash.get(endpoint=server.url("", "https")), "status 403")
    assert s3_dash.rejected == rejected


def test_a_session_token_goes_to_no_other_host(s3_dash: S3Node) -> None:
    tls = pki.issue(s3_dash.site.authority, s3_dash.site.directory, "fake")
    with (
        hostile(fake.whole(DATA), tls=tls) as other,
        hostile(fake.redirect(other.url("/x", "https")), tls=tls) as server,
    ):
        done = s3_dash.get(endpoint=server.url("", "https"), session_token="t0ken/+=")  # noqa: S106 - a test's
        assert s3_dash.failed(done, "status 302")
        assert other.requests == []
        # Without one, there is nothing in the request that the other host may not have.
        assert s3_dash.got(s3_dash.get(endpoint=server.url("", "https")))
        assert "Authorization" not in other.requests[0][1]


def test_a_busy_service_is_waited_for_and_signed_for_anew(s3_dash: S3Node) -> None:
    tls = pki.issue(s3_dash.site.authority, s3_dash.site.directory, "fake")
    busy = fake.status(503, {"Retry-After": 1}, error("SlowDown"))
    with hostile(busy, fake.whole(DATA), tls=tls) as server:
        done = s3_dash.get(endpoint=server.url("", "https"))
        assert s3_dash.got(done)
        assert "attempt 1 of 4: " in done.stderr
        assert [path for path, _ in server.requests] == ["/images/node.squashfs"] * 2
        times = [headers["x-amz-date"] for _, headers in server.requests]
        assert times[0] != times[1]


def test_an_endpoint_without_tls_needs_a_digest(s3: S3Node) -> None:
    with hostile(fake.whole(DATA)) as server:
        assert s3.failed(s3.get(endpoint=server.url("")), "without a digest", "http:// endpoint")
        assert server.requests == []
        assert s3.got(s3.get(endpoint=server.url(""), sha256=DIGEST))


@pytest.mark.parametrize(
    ("url", "parameters", "message"),
    [
        ("s3://images", {}, "is no object of S3"),
        ("s3://images/", {}, "is no object of S3"),
        ("s3:///key", {}, "is no object of S3"),
        ("s3://my_images%20/key", {}, "is no object of S3"),
        ("s3://images/k?versionId=1", {}, "a presigned URL is an https:// URL"),
        ("s3://user@images/k", {}, "is no object of S3"),
        ("s3://images:1/k", {}, "is no object of S3"),
        ("s3://images/100%", {}, "without two hexadecimal digits"),
        ("s3://images/k", {"endpoint": "https://127.0.0.1/x"}, "more than a host and a port"),
        ("s3://images/k", {"endpoint": "https://u:p@127.0.0.1"}, "more than a host and a port"),
    ],
)
def test_what_cannot_be_an_object_is_refused(
    s3_dash: S3Node, url: str, parameters: dict[str, str], message: str
) -> None:
    assert s3_dash.failed(s3_dash.get(url, given=parameters), message)


# --- Presigned URLs, which the https transport carries ----------------------------------------------------


def test_a_presigned_url_goes_from_a_kernel_command_line_to_the_service(s3: S3Node, s3_site: S3Site) -> None:
    url = presigned(s3_site.s3, "images", "a b+c.img")
    assert "&" in url
    assert "%2B" in url
    _, word, _ = cmdline.split(f"root=anchor rd.anchor.squashfs.url={url} quiet")
    assert word.value is not None
    assert paramtypes.check_value("url", word.value, {}) == url
    node = https_node.Node(s3.shell)
    done = node.fetch(word.value, DIGEST)
    assert node.got(done)
    assert "X-Amz" not in done.stderr
    late = node.fetch(presigned(s3_site.s3, "images", "a b+c.img", lifetime_s=300).replace("a%20b", "b"))
    assert node.failed(late, "status 403: this node may not have it")


def test_the_image_of_a_disk_streams_out_of_a_bucket(s3_site: S3Site, tmp_path: Path) -> None:
    packed = gzip.compress(disk_node.IMAGE, 1)
    s3_site.put("disk.img.gz", packed)
    s3 = s3_site.s3
    given = {"s3_endpoint": s3.endpoint, "s3_region": s3.region, "s3_style": "", "s3_proxy": "", "s3_session_token": ""}
    given |= {"s3_access_key": s3.access_key, "s3_secret_key": s3.secret_key}
    for node in disk_node.prepared("dash", tmp_path):
        shutil.copy(s3_site.authority.certificate, node.shell.root / "etc/anchor/ca.pem")
        s3_site.requests()
        done = node.run(disk_url="s3://images/disk.img.gz", disk_sha256=hashlib.sha256(packed).hexdigest(), **given)
        assert node.installed(done)
        # In one request, and what came was never a file on the node.
        assert s3_site.requests() == ["GET /images/disk.img.gz 200"]
