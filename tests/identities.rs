//! The key client as each kind of identity, against the embedded key vault: what it can do, and
//! what it is told when its identity, its proof or its tenant is taken away.

#[path = "support/ports.rs"]
mod ports;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use byokfs::key::custody::{Enrolment, Refusal, enrol, revalidate};
use byokfs::key::provider::{AppService, Application, Identity, Imds, Settings, for_key};
use byokfs::key::reason::Reason;
use byokfs::key::requirement;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);
const APP: &str = "app";

/// A vault of its own with one key, and an application that may use it.
struct Vault {
    dir: tempfile::TempDir,
    server: Server,
    url: String,
    tenant: String,
    client_id: String,
    key: String,
}

impl Vault {
    /// With `init`'s options, a key of the given type, and a grant by `allow`.
    fn start(init: &[&str], key: &[&str], allow: &[&str]) -> Vault {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vault");
        let [port, identity_port] = &ports::options();
        run(&path, &[&["init", path.to_str().unwrap(), port, identity_port], init].concat());
        let server = serve(&path, &[]);
        let url = fs::read_to_string(path.join("url")).unwrap().trim().to_owned();
        let url = url.trim_end_matches('/').to_owned();
        let app = run(&path, &["identity", "create", APP, "--user-assigned", "--json"]);
        let app: Value = serde_json::from_str(&app).unwrap();
        let text = |field: &str| app[field].as_str().unwrap().to_owned();
        let (tenant, client_id) = (text("tenantId"), text("clientId"));
        let create = [&["key", "create", "--name", "kek"], key].concat();
        let key = run(&path, &create).trim().to_owned();
        let vault = Vault { dir, server, url, tenant, client_id, key };
        vault.run(&[allow, &["--identity", APP]].concat());
        vault
    }

    fn plain() -> Vault {
        Vault::start(&[], &["--size", "2048"], &GRANT)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vault")
    }

    fn run(&self, args: &[&str]) -> String {
        run(&self.path(), args)
    }

    fn application(&self) -> Application {
        Application {
            tenant: Some(self.tenant.clone()),
            client_id: Some(self.client_id.clone()),
            authority: Some(self.url.clone()),
        }
    }

    fn settings(&self, identity: Identity) -> Settings {
        Settings { identity, ca_file: Some(self.path().join("ca.pem")), ..Settings::default() }
    }

    fn enrol(&self, identity: Identity) -> Result<Enrolment, Refusal> {
        let provider = for_key(&self.key, &self.settings(identity)).unwrap();
        let enrolled =
            enrol(&*provider, &self.key, None, &requirement::Settings::default(), LIMIT)?;
        let (envelope, pin) = (enrolled.envelope([1; 16]), &enrolled.fingerprint);
        revalidate(&*provider, &envelope, pin, &requirement::Settings::default(), LIMIT)?;
        Ok(enrolled)
    }

    /// Everything works, and the tenants that the check compares are the vault's.
    #[track_caller]
    fn works(&self, identity: Identity) {
        let enrolled = self.enrol(identity).unwrap();
        assert_eq!(enrolled.info.tenant.as_deref(), Some(self.tenant.as_str()));
        assert_eq!(enrolled.info.identity_tenant, enrolled.info.tenant);
        assert_eq!(enrolled.report.failures().count(), 0, "{}", enrolled.report);
    }

    #[track_caller]
    fn refuses(&self, identity: Identity, reason: Reason) {
        let refusal = self.enrol(identity).unwrap_err();
        assert_eq!(refusal.reason, reason, "{refusal}");
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// An identity by a secret that the vault makes.
    fn by_secret(&self) -> Identity {
        let file = self.dir.path().join("secret");
        self.run(&["identity", "add-secret", APP, "--secret-file", file.to_str().unwrap()]);
        Identity::ClientSecret(self.application(), file)
    }
}

/// The vault's process, and the end of its standard output, which it may write to.
struct Server(Child, #[allow(dead_code)] BufReader<ChildStdout>);

impl Server {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Returns when it listens, on the ports it had before.
fn serve(vault: &Path, options: &[&str]) -> Server {
    let mut server = Command::new(env!("CARGO_BIN_EXE_byokfs"))
        .args(["vault", "serve"])
        .args(options)
        .arg(vault)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(server.stdout.take().unwrap());
    // The lines that tell the addresses come when it listens.
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let server = Server(server, output);
    assert!(!line.is_empty(), "the vault does not start");
    server
}

const GRANT: [&str; 3] = ["grant", "--key-permissions", "get,list,wrapKey,unwrapKey"];

fn run(vault: &Path, args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_byokfs"))
        .arg("vault")
        .args(args)
        .env("BYOKFS_VAULT", vault)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "vault {args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn an_application_with_a_secret() {
    let vault = Vault::plain();
    let identity = vault.by_secret();
    vault.works(identity.clone());
    let wrong = vault.file("wrong", "not its secret");
    vault.refuses(Identity::ClientSecret(vault.application(), wrong), Reason::CredentialInvalid);
    let Identity::ClientSecret(_, file) = &identity else { unreachable!() };
    let elsewhere = Application { tenant: Some("no-such".into()), ..vault.application() };
    vault.refuses(Identity::ClientSecret(elsewhere, file.clone()), Reason::CredentialInvalid);
    let nobody = Application { client_id: Some("nobody".into()), ..vault.application() };
    vault.refuses(Identity::ClientSecret(nobody, file.clone()), Reason::IdentityGone);
    vault.run(&["identity", "disable", APP]);
    vault.refuses(identity.clone(), Reason::IdentityGone);
    vault.run(&["identity", "enable", APP]);
    vault.works(identity.clone());
    vault.run(&["identity", "delete", APP]);
    vault.refuses(identity, Reason::IdentityGone);
}

#[test]
fn an_application_with_a_certificate() {
    let vault = Vault::plain();
    let pair = {
        use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
        let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        let der: Pkcs8V1Der<'_> = pair.as_der().unwrap();
        rcgen::KeyPair::try_from(der.as_ref()).unwrap()
    };
    let certificate = rcgen::CertificateParams::new(vec!["app.example".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&pair).unwrap().pem();
    // In the order of Azure's own tool.
    let file = vault.file("app.pem", &format!("{}{certificate}", pair.serialize_pem()));
    let identity = Identity::ClientCertificate(vault.application(), file);
    vault.refuses(identity.clone(), Reason::CredentialInvalid);
    let public = vault.file("public.pem", &certificate);
    vault.run(&["identity", "add-certificate", APP, "--file", public.to_str().unwrap()]);
    vault.works(identity);
}

#[test]
fn a_workload_with_a_federated_token() {
    let vault = Vault::plain();
    let pair = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["issuer".to_owned()]).unwrap();
    let keys = vault.file("issuer.pem", &certificate.self_signed(&pair).unwrap().pem());
    let subject = "system:serviceaccount:db:mysql";
    let token = |expires: i64| {
        let claims = json!({
            "iss": "https://cluster.example",
            "sub": subject,
            "aud": "api://AzureADTokenExchange",
            "exp": expires,
        });
        let key = jsonwebtoken::EncodingKey::from_ec_der(&pair.serialize_der());
        let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        jsonwebtoken::encode(&header, &claims, &key).unwrap()
    };
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let file = vault.file("federated", &token(now + 600));
    let identity = Identity::WorkloadIdentity(vault.application(), Some(file));
    vault.refuses(identity.clone(), Reason::CredentialInvalid);
    let add = ["identity", "add-federated", APP, "--issuer", "https://cluster.example"];
    let rest = ["--subject", subject, "--keys-file", keys.to_str().unwrap()];
    vault.run(&[&add[..], &rest].concat());
    vault.works(identity.clone());
    vault.file("federated", &token(now - 600));
    vault.refuses(identity, Reason::CredentialInvalid);
}

#[test]
fn a_machine_and_an_identity_that_is_assigned_to_it() {
    let mut vault = Vault::plain();
    vault.run(&["identity", "create", "host"]);
    vault.server.end();
    vault.server = serve(&vault.path(), &["--imds", "host"]);
    let endpoint = fs::read_to_string(vault.path().join("identity.url")).unwrap();
    let base = endpoint.trim().trim_end_matches("/msi/token");
    let imds = |client_id: Option<&str>| {
        Identity::Imds(Imds {
            endpoint: Some(format!("{base}/metadata/identity/oauth2/token")),
            client_id: client_id.map(str::to_owned),
        })
    };
    // The machine's own identity may do nothing; the other one is not assigned to it yet.
    vault.refuses(imds(None), Reason::PermissionRevoked);
    let assigned = imds(Some(&vault.client_id));
    vault.refuses(assigned.clone(), Reason::IdentityGone);
    vault.run(&["identity", "assign", APP, "--host", "host"]);
    vault.works(assigned.clone());
    let service = Identity::AppService(AppService {
        endpoint: Some(endpoint.trim().to_owned()),
        header_file: Some(vault.path().join("identities/host.header")),
        client_id: Some(vault.client_id.clone()),
    });
    vault.works(service.clone());
    vault.run(&["identity", "unassign", APP, "--host", "host"]);
    vault.refuses(assigned, Reason::IdentityGone);
    vault.refuses(service, Reason::IdentityGone);
}

#[test]
fn an_identity_of_another_tenant_is_told() {
    let vault = Vault::plain();
    let identity = vault.by_secret();
    vault.run(&["update", "--tenant", "00000000-0000-0000-0000-000000000009"]);
    vault.refuses(identity, Reason::TokenRefused);
}

#[test]
fn roles_instead_of_policies() {
    let role = ["role", "assign", "--role", "Key Vault Crypto Service Encryption User"];
    let vault = Vault::start(&["--rbac"], &["--size", "2048"], &role);
    let identity = vault.by_secret();
    vault.works(identity.clone());
    let role = ["role", "remove", "--role", "Key Vault Crypto Service Encryption User"];
    vault.run(&[&role[..], &["--identity", APP]].concat());
    vault.refuses(identity, Reason::PermissionRevoked);
}

#[test]
fn a_managed_hsm_and_its_symmetric_key() {
    let role = ["role", "assign", "--role", "Managed HSM Crypto Service Encryption User"];
    for (kind, algorithm) in [
        (["--kty", "RSA-HSM", "--size", "3072"], "RSA-OAEP-256"),
        (["--kty", "oct-HSM", "--size", "256"], "A256KW"),
    ] {
        let vault = Vault::start(&["--flavor", "mhsm"], &kind, &role);
        let identity = vault.by_secret();
        let enrolled = vault.enrol(identity.clone()).unwrap();
        assert_eq!(enrolled.envelope([1; 16]).algorithm.name(), algorithm);
        assert_eq!(enrolled.info.key_type, kind[1]);
        assert_eq!(enrolled.report.failures().count(), 0, "{}", enrolled.report);
        let role = ["role", "remove", "--role", "Managed HSM Crypto Service Encryption User"];
        vault.run(&[&role[..], &["--identity", APP]].concat());
        vault.refuses(identity, Reason::PermissionRevoked);
    }
}
