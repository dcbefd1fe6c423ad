"""The official Python clients, unchanged, against the embedded key vault.

scripts/suites.d/azure-clients.sh prepares the vaults and the environment. Challenge verification
is on throughout: the vaults are asked under their names, not by address.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

import jwt
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.identity import (
    CertificateCredential,
    ClientSecretCredential,
    EnvironmentCredential,
    ManagedIdentityCredential,
    WorkloadIdentityCredential,
)
from azure.keyvault.keys import (
    ApiVersion,
    JsonWebKey,
    KeyClient,
    KeyRotationLifetimeAction,
    KeyRotationPolicy,
    KeyRotationPolicyAction,
)
from azure.keyvault.keys.crypto import (
    CryptographyClient,
    EncryptionAlgorithm,
    KeyWrapAlgorithm,
    SignatureAlgorithm,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

VAULT = os.environ["CONFORMANCE_VAULT"]
HSM = os.environ["CONFORMANCE_HSM"]
AUTHORITY = os.environ["CONFORMANCE_AUTHORITY"]
DIRECTORY = os.environ["CONFORMANCE_VAULT_DIR"]
HSM_DIRECTORY = os.environ["CONFORMANCE_HSM_DIR"]


def byokfs(*arguments, directory=DIRECTORY):
    """A verb of the vault's own command line; its JSON."""
    command = [os.environ["BYOKFS_BINARY"], "vault", *arguments, "--json"]
    environment = {**os.environ, "BYOKFS_VAULT": directory}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{arguments}: {done.stderr}")
    return json.loads(done.stdout)


def header(identity, directory=DIRECTORY):
    with open(f"{directory}/identities/{identity}.header", encoding="ascii") as file:
        return file.read().strip()


def managed_identity(identity, directory=DIRECTORY, **options):
    """As App Service hands it to a process.

    The client reads the environment when it asks for a token, so it asks while this one holds.
    """
    with open(f"{directory}/identity.url", encoding="ascii") as file:
        os.environ["IDENTITY_ENDPOINT"] = file.read().strip()
    os.environ["IDENTITY_HEADER"] = header(identity, directory)
    credential = ManagedIdentityCredential(**options)
    domain = (HSM if directory == HSM_DIRECTORY else VAULT).split(".", 1)[1]
    credential.get_token(f"https://{domain}/.default")
    return credential


class Keys(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = KeyClient(VAULT, managed_identity("officer"))

    def test_the_life_of_a_key(self):
        expires = datetime.datetime(2030, 1, 1, tzinfo=datetime.timezone.utc)
        made = self.client.create_rsa_key(
            "life", size=3072, expires_on=expires, tags={"purpose": "kek"}, enabled=True
        )
        self.assertTrue(made.id.startswith(f"{VAULT}/keys/life/"))
        self.assertEqual(len(made.key.n), 384)
        got = self.client.get_key("life")
        self.assertEqual(got.id, made.id)
        self.assertEqual(got.properties.expires_on, expires)
        self.assertEqual(got.properties.tags, {"purpose": "kek"})
        self.assertEqual(got.properties.recoverable_days, 90)
        self.assertEqual(self.client.get_key("life", got.properties.version).id, made.id)
        later = expires + datetime.timedelta(days=1)
        updated = self.client.update_key_properties("life", expires_on=later, tags={"a": "b"})
        self.assertEqual(updated.properties.expires_on, later)
        self.assertEqual(updated.properties.tags, {"a": "b"})
        second = self.client.create_rsa_key("life", hardware_protected=True)
        self.assertEqual(second.key_type, "RSA-HSM")
        versions = list(self.client.list_properties_of_key_versions("life"))
        self.assertEqual({one.version for one in versions}, {made.properties.version, second.properties.version})
        with self.assertRaises(ResourceNotFoundError):
            self.client.get_key("life", "0" * 32)
        with self.assertRaises(ResourceNotFoundError):
            self.client.get_key("nothing")

    def test_lists_come_in_pages(self):
        names = {f"page-{number:02}" for number in range(30)}
        for name in names:
            self.client.create_rsa_key(name, size=2048)
        pages = [list(page) for page in self.client.list_properties_of_keys(max_page_size=7).by_page()]
        self.assertTrue(all(len(page) <= 7 for page in pages))
        seen = {one.name for page in pages for one in page}
        self.assertTrue(names <= seen)
        self.assertTrue(names <= {one.name for one in self.client.list_properties_of_keys()})

    def test_pollers_of_deletion_and_recovery(self):
        made = self.client.create_rsa_key("gone", size=2048)
        poller = self.client.begin_delete_key("gone")
        deleted = poller.result()
        poller.wait()
        self.assertEqual(deleted.recovery_id, f"{VAULT}/deletedkeys/gone")
        retention = deleted.scheduled_purge_date - deleted.deleted_date
        self.assertEqual(retention.days, 90)
        self.assertIn("gone", [one.name for one in self.client.list_deleted_keys()])
        self.assertEqual(self.client.get_deleted_key("gone").id, made.id)
        with self.assertRaises(ResourceExistsError):
            self.client.create_rsa_key("gone")
        recovered = self.client.begin_recover_deleted_key("gone")
        recovered.wait()
        self.assertEqual(recovered.result().id, made.id)
        self.assertEqual(self.client.get_key("gone").id, made.id)
        self.client.begin_delete_key("gone").wait()
        self.client.purge_deleted_key("gone")
        with self.assertRaises(ResourceNotFoundError):
            self.client.get_deleted_key("gone")

    def test_backup_and_restore(self):
        made = self.client.create_rsa_key("escrow", size=2048)
        backup = self.client.backup_key("escrow")
        with self.assertRaises(ResourceExistsError):
            self.client.restore_key_backup(backup)
        self.client.begin_delete_key("escrow").wait()
        self.client.purge_deleted_key("escrow")
        self.assertEqual(self.client.restore_key_backup(backup).id, made.id)

    def test_rotation_by_policy_and_by_hand(self):
        self.client.create_rsa_key("turn", size=2048)
        action = KeyRotationLifetimeAction(KeyRotationPolicyAction.rotate, time_after_create="P2M")
        policy = self.client.update_key_rotation_policy(
            "turn", KeyRotationPolicy(lifetime_actions=[action]), expires_in="P90D"
        )
        self.assertEqual(policy.expires_in, "P90D")
        got = self.client.get_key_rotation_policy("turn")
        self.assertEqual(got.lifetime_actions[0].time_after_create, "P2M")
        self.assertTrue(got.id.endswith("/keys/turn/rotationpolicy"))
        before = self.client.get_key("turn")
        rotated = self.client.rotate_key("turn")
        self.assertNotEqual(rotated.id, before.id)
        lifetime = rotated.properties.expires_on - rotated.properties.created_on
        self.assertEqual(lifetime.days, 90)

    def test_import(self):
        private = rsa.generate_private_key(65537, 2048)
        numbers, public = private.private_numbers(), private.public_key().public_numbers()

        def big_endian(number):
            return number.to_bytes((number.bit_length() + 7) // 8, "big")

        jwk = JsonWebKey(
            kty="RSA", key_ops=["wrapKey", "unwrapKey"],
            n=big_endian(public.n), e=big_endian(public.e), d=big_endian(numbers.d),
            p=big_endian(numbers.p), q=big_endian(numbers.q), dp=big_endian(numbers.dmp1),
            dq=big_endian(numbers.dmq1), qi=big_endian(numbers.iqmp),
        )
        self.assertEqual(self.client.import_key("outside", jwk).key.n, big_endian(public.n))

    def test_the_cryptography_client(self):
        key = self.client.create_rsa_key("crypto", size=2048)
        crypto = self.client.get_cryptography_client("crypto", key_version=key.properties.version)
        secret = os.urandom(32)
        for algorithm in (KeyWrapAlgorithm.rsa_oaep, KeyWrapAlgorithm.rsa_oaep_256, KeyWrapAlgorithm.rsa1_5):
            wrapped = crypto.wrap_key(algorithm, secret)
            self.assertEqual(crypto.unwrap_key(algorithm, wrapped.encrypted_key).key, secret)
        for algorithm in (EncryptionAlgorithm.rsa_oaep, EncryptionAlgorithm.rsa_oaep_256):
            sealed = crypto.encrypt(algorithm, secret)
            self.assertEqual(crypto.decrypt(algorithm, sealed.ciphertext).plaintext, secret)
        digest = hashes.Hash(hashes.SHA256())
        digest.update(b"text")
        digest = digest.finalize()
        for algorithm in (SignatureAlgorithm.rs256, SignatureAlgorithm.ps256):
            signature = crypto.sign(algorithm, digest).signature
            self.assertTrue(crypto.verify(algorithm, digest, signature).is_valid)
        # By the id alone and without get, wrapping goes to the vault.
        self.client.update_key_properties("crypto", enabled=False)
        with self.assertRaises(HttpResponseError) as refused:
            crypto.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key)
        self.assertEqual(refused.exception.status_code, 403)
        self.assertEqual(refused.exception.error.innererror["code"], "KeyDisabled")

    def test_wrapping_at_the_vault(self):
        key = self.client.create_rsa_key("remote", size=2048)
        only_wraps = managed_identity("wrapper")
        crypto = CryptographyClient(key.id, only_wraps)
        wrapped = crypto.wrap_key(KeyWrapAlgorithm.rsa_oaep_256, b"7" * 32)
        self.assertEqual(wrapped.key_id, key.id)
        self.assertEqual(crypto.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key).key, b"7" * 32)
        with self.assertRaises(HttpResponseError) as refused:
            KeyClient(VAULT, only_wraps).get_key("remote")
        self.assertEqual(refused.exception.status_code, 403)
        self.assertEqual(refused.exception.error.innererror["code"], "ForbiddenByPolicy")

    def test_every_version_of_the_api(self):
        self.client.create_rsa_key("api", size=2048)
        for version in ApiVersion:
            client = KeyClient(VAULT, managed_identity("officer"), api_version=version)
            self.assertEqual(client.get_key("api").name, "api", version)


class Credentials(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tenant = byokfs("show")["tenantId"]
        cls.client_id = byokfs("identity", "create", "app", "--user-assigned")["clientId"]
        byokfs("grant", "--identity", "app", "--key-permissions", "list")
        cls.directory = tempfile.TemporaryDirectory()

    @classmethod
    def tearDownClass(cls):
        cls.directory.cleanup()

    def path(self, name):
        return os.path.join(self.directory.name, name)

    def works(self, credential):
        self.assertIsNotNone(list(KeyClient(VAULT, credential).list_properties_of_keys()))

    def secret_credential(self, secret, tenant=None, **options):
        return ClientSecretCredential(
            tenant or self.tenant, self.client_id, secret, authority=AUTHORITY,
            disable_instance_discovery=True, **options,
        )

    def test_client_secrets(self):
        byokfs("identity", "add-secret", "app", "--secret-file", self.path("secret"))
        byokfs("identity", "add-secret", "app", "--secret-file", self.path("ended"), "--expires", "2020-01-01T00:00:00Z")
        with open(self.path("secret"), encoding="ascii") as file:
            secret = file.read()
        with open(self.path("ended"), encoding="ascii") as file:
            ended = file.read()
        self.works(self.secret_credential(secret))
        for wrong, number in ((ended, "AADSTS7000222"), ("wrong", "AADSTS7000215")):
            with self.assertRaises(ClientAuthenticationError) as refused:
                self.works(self.secret_credential(wrong))
            self.assertIn(number, refused.exception.message)
        with self.assertRaises(ClientAuthenticationError):
            self.works(self.secret_credential(secret, tenant="nowhere"))

    def test_the_environment(self):
        byokfs("identity", "add-secret", "app", "--secret-file", self.path("environment"))
        with open(self.path("environment"), encoding="ascii") as file:
            secret = file.read()
        names = {
            "AZURE_TENANT_ID": self.tenant, "AZURE_CLIENT_ID": self.client_id, "AZURE_CLIENT_SECRET": secret,
        }
        os.environ.update(names)
        try:
            self.works(EnvironmentCredential(authority=AUTHORITY, disable_instance_discovery=True))
        finally:
            for name in names:
                del os.environ[name]

    def test_the_challenge_is_verified(self):
        by_address = f"https://127.0.0.1:{VAULT.rsplit(':', 1)[1]}"
        credential = managed_identity("officer")
        with self.assertRaises(ValueError) as refused:
            KeyClient(by_address, credential).get_key("any")
        self.assertIn("does not match the requested domain", str(refused.exception))
        trusting = KeyClient(by_address, credential, verify_challenge_resource=False)
        trusting.create_rsa_key("address", size=2048)
        self.assertTrue(trusting.get_key("address").id.startswith(by_address))

    def test_workload_identity(self):
        private = rsa.generate_private_key(65537, 2048)
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with open(self.path("public.pem"), "wb") as file:
            file.write(public)
        subject = "system:serviceaccount:db:mysql"
        byokfs(
            "identity", "add-federated", "app", "--issuer", "https://cluster",
            "--subject", subject, "--keys-file", self.path("public.pem"),
        )
        now = int(time.time())
        claims = {
            "iss": "https://cluster", "sub": subject, "aud": ["api://AzureADTokenExchange"],
            "iat": now, "nbf": now, "exp": now + 600,
        }
        with open(self.path("token"), "w", encoding="ascii") as file:
            file.write(jwt.encode(claims, private, algorithm="RS256"))
        self.works(WorkloadIdentityCredential(
            tenant_id=self.tenant, client_id=self.client_id, token_file_path=self.path("token"),
            authority=AUTHORITY, disable_instance_discovery=True,
        ))

    def test_certificates(self):
        private = rsa.generate_private_key(65537, 2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "app")])
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name)
            .public_key(private.public_key()).serial_number(1)
            .not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
            .sign(private, hashes.SHA256())
        ).public_bytes(serialization.Encoding.PEM)
        key = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with open(self.path("certificate.pem"), "wb") as file:
            file.write(certificate)
        byokfs("identity", "add-certificate", "app", "--file", self.path("certificate.pem"))
        self.works(CertificateCredential(
            self.tenant, self.client_id, certificate_data=certificate + key,
            authority=AUTHORITY, disable_instance_discovery=True,
        ))

    def test_user_assigned_identities(self):
        made = byokfs("identity", "create", "shared", "--user-assigned")
        byokfs("grant", "--identity", "shared", "--key-permissions", "list")
        with self.assertRaises(ClientAuthenticationError):
            self.works(managed_identity("officer", client_id=made["clientId"]))
        byokfs("identity", "assign", "shared", "--host", "officer")
        self.works(managed_identity("officer", client_id=made["clientId"]))

    def test_imds(self):
        # In a process of its own: the client decides by its environment once.
        program = (
            "import os\n"
            "from azure.identity import ManagedIdentityCredential\n"
            "from azure.keyvault.keys import KeyClient\n"
            "client = KeyClient(os.environ['CONFORMANCE_VAULT'], ManagedIdentityCredential())\n"
            "print(client.get_key('imds').name)\n"
        )
        KeyClient(VAULT, managed_identity("officer")).create_rsa_key("imds", size=2048)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")
        }
        with open(f"{DIRECTORY}/identity.url", encoding="ascii") as file:
            endpoint = file.read().strip().removesuffix("/msi/token")
        environment["AZURE_POD_IDENTITY_AUTHORITY_HOST"] = endpoint
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "imds"), done.stderr)

    def test_another_tenants_identity(self):
        byokfs("identity", "create", "guest", "--tenant", "another-tenant")
        byokfs("grant", "--identity", "guest", "--key-permissions", "list")
        with self.assertRaises(ClientAuthenticationError) as refused:
            self.works(managed_identity("guest"))
        self.assertIn("AKV10032", str(refused.exception))


class ManagedHsm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        credential = managed_identity("officer", HSM_DIRECTORY)
        cls.credential = credential
        cls.client = KeyClient(HSM, credential)

    def test_keys_of_an_hsm(self):
        made = self.client.create_oct_key("aes", size=256, hardware_protected=True)
        self.assertEqual(made.key_type, "oct-HSM")
        crypto = CryptographyClient(made.id, self.credential)
        wrapped = crypto.wrap_key(KeyWrapAlgorithm.aes_256, b"7" * 32)
        self.assertEqual(crypto.unwrap_key(KeyWrapAlgorithm.aes_256, wrapped.encrypted_key).key, b"7" * 32)
        made = self.client.create_rsa_key("rsa", size=3072, hardware_protected=True)
        self.assertEqual(made.key_type, "RSA-HSM")
        self.client.begin_delete_key("rsa").wait()
        self.client.begin_recover_deleted_key("rsa").wait()

    def test_random_bytes(self):
        self.assertEqual(len(self.client.get_random_bytes(64)), 64)

    def test_a_missing_role(self):
        byokfs("identity", "create", "nobody", directory=HSM_DIRECTORY)
        client = KeyClient(HSM, managed_identity("nobody", HSM_DIRECTORY))
        with self.assertRaises(HttpResponseError) as refused:
            client.get_key("aes")
        self.assertEqual(refused.exception.status_code, 403)
        self.assertEqual(refused.exception.error.code, "AccessDenied")


if __name__ == "__main__":
    unittest.main(verbosity=2)
