//! The token endpoint of applications: secrets, certificates, federated tokens, and every refusal.

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::harness::{Answer, Server, Vault, grant, now};

struct Application {
    vault: Vault,
    server: Server,
    client_id: String,
}

impl Application {
    fn new() -> Application {
        let vault = Vault::new(&["--tenant", "t1"]);
        let server = vault.serve();
        let made = vault.cli_json(&["identity", "create", "app", "--user-assigned"]);
        grant(&vault, "app", "list");
        let client_id = made["clientId"].as_str().unwrap().to_owned();
        Application { vault, server, client_id }
    }

    fn post(&self, path: &str, fields: &[(&str, &str)]) -> Answer {
        let body =
            url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        let url = format!("{}{path}", self.server.url);
        let headers = [("content-type", "application/x-www-form-urlencoded")];
        self.server.send("POST", &url, &headers, body.as_bytes()).unwrap()
    }

    fn scope(&self) -> String {
        format!("{}/.default", self.server.url)
    }

    fn with_secret(&self, secret: &str) -> Answer {
        self.post(
            "/t1/oauth2/v2.0/token",
            &[
                ("grant_type", "client_credentials"),
                ("client_id", &self.client_id),
                ("client_secret", secret),
                ("scope", &self.scope()),
            ],
        )
    }

    fn with_assertion(&self, assertion: &str) -> Answer {
        self.post(
            "/T1/oauth2/v2.0/token",
            &[
                ("grant_type", "client_credentials"),
                ("client_id", &self.client_id),
                ("client_assertion", assertion),
                ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
                ("scope", &self.scope()),
            ],
        )
    }

    fn add_secret(&self, name: &str, expires: &str) -> (String, String) {
        let file = self.vault.dir.join(name);
        let made = self.vault.cli_json(&[
            "identity",
            "add-secret",
            "app",
            "--secret-file",
            file.to_str().unwrap(),
            "--expires",
            expires,
        ]);
        (made["id"].as_str().unwrap().to_owned(), std::fs::read_to_string(file).unwrap())
    }

    fn works(&self, answer: Answer) {
        let reply = answer.ok();
        assert_eq!(reply["token_type"], "Bearer");
        let token = reply["access_token"].as_str().unwrap();
        self.server.call(token, "GET", "/keys", Value::Null).ok();
    }
}

/// Status, error and AADSTS number.
fn refused(answer: &Answer) -> (u16, String, u64) {
    let body = &answer.body;
    let number = body["error_codes"][0].as_u64().unwrap();
    let description = body["error_description"].as_str().unwrap();
    assert!(description.starts_with(&format!("AADSTS{number}: ")), "{description}");
    for field in ["timestamp", "trace_id", "correlation_id"] {
        assert!(body[field].is_string(), "{field}");
    }
    (answer.status, body["error"].as_str().unwrap().to_owned(), number)
}

fn is(status: u16, error: &str, number: u64) -> (u16, String, u64) {
    (status, error.to_owned(), number)
}

#[test]
fn a_secret_gets_tokens_until_it_ends() {
    let app = Application::new();
    let (_, expired) = app.add_secret("expired", "2020-01-01T00:00:00Z");
    let (id, secret) = app.add_secret("good", "2099-01-01T00:00:00Z");
    let answer = app.with_secret(&secret);
    assert!(answer.body["expires_in"].is_u64() && answer.body["ext_expires_in"].is_u64());
    app.works(answer);
    let version_1 = app.post(
        "/t1/oauth2/token",
        &[
            ("grant_type", "client_credentials"),
            ("client_id", &app.client_id),
            ("client_secret", &secret),
            ("resource", &app.server.url),
        ],
    );
    assert!(version_1.body["expires_on"].is_string());
    app.works(version_1);
    assert_eq!(refused(&app.with_secret(&expired)), is(401, "invalid_client", 7000222));
    assert_eq!(refused(&app.with_secret("wrong")), is(401, "invalid_client", 7000215));
    app.vault.cli_json(&["identity", "disable", "app"]);
    assert_eq!(refused(&app.with_secret(&secret)), is(400, "unauthorized_client", 7000112));
    app.vault.cli_json(&["identity", "enable", "app"]);
    app.works(app.with_secret(&secret));
    let listed = app.vault.cli_json(&["identity", "credentials", "app"]);
    assert_eq!(listed.as_array().unwrap().len(), 2);
    app.vault.cli_json(&["identity", "remove-credential", "app", "--id", &id]);
    assert_eq!(refused(&app.with_secret(&secret)), is(401, "invalid_client", 7000215));
    app.vault.cli_json(&["identity", "delete", "app"]);
    assert_eq!(refused(&app.with_secret(&secret)), is(400, "unauthorized_client", 700016));
    // Secrets are nowhere but in their files.
    let log = std::fs::read_to_string(app.vault.dir.join("audit.jsonl")).unwrap();
    assert!(!log.contains(&secret) && !log.contains(&expired));
    let database = std::fs::read(app.vault.dir.join("vault.db")).unwrap();
    assert!(!database.windows(secret.len()).any(|window| window == secret.as_bytes()));
}

#[test]
fn what_is_asked_wrongly_is_refused_in_the_words_of_the_service() {
    let app = Application::new();
    let (_, secret) = app.add_secret("s", "none");
    let scope = app.scope();
    let good = [
        ("grant_type", "client_credentials"),
        ("client_id", app.client_id.as_str()),
        ("client_secret", secret.as_str()),
        ("scope", scope.as_str()),
    ];
    let path = "/t1/oauth2/v2.0/token";
    app.works(app.post(path, &good));
    let changed = |name: &str, value: &'static str| {
        let fields: Vec<_> = good
            .iter()
            .map(|(own, old)| (*own, if *own == name { value } else { *old }))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        refused(&app.post(path, &fields))
    };
    assert_eq!(changed("grant_type", "password"), is(400, "unsupported_grant_type", 70003));
    assert_eq!(changed("grant_type", ""), is(400, "invalid_request", 900144));
    assert_eq!(changed("scope", ""), is(400, "invalid_request", 900144));
    assert_eq!(changed("scope", "https://v"), is(400, "invalid_scope", 1002012));
    assert_eq!(changed("client_secret", ""), is(401, "invalid_client", 7000218));
    assert_eq!(changed("client_id", "x"), is(400, "unauthorized_client", 700016));
    assert_eq!(
        refused(&app.post("/nowhere/oauth2/v2.0/token", &good)),
        is(400, "invalid_request", 90002)
    );
    // In another tenant that does exist.
    app.vault.cli_json(&["identity", "create", "guest", "--user-assigned", "--tenant", "t2"]);
    assert_eq!(
        refused(&app.post("/t2/oauth2/v2.0/token", &good)),
        is(400, "unauthorized_client", 700016)
    );
    let url = format!("{}{path}", app.server.url);
    assert_eq!(app.server.send("GET", &url, &[], b"").unwrap().status, 405);
}

#[test]
fn the_documents_lead_to_the_endpoint_and_the_keys_verify_its_tokens() {
    let app = Application::new();
    let get = |url: &str| app.server.send("GET", url, &[], b"").unwrap().ok();
    let base = format!("{}/t1", app.server.url);
    let document = get(&format!("{base}/v2.0/.well-known/openid-configuration"));
    assert_eq!(document["token_endpoint"], format!("{base}/oauth2/v2.0/token"));
    assert!(document["issuer"].as_str().unwrap().starts_with(&base));
    assert!(document["authorization_endpoint"].is_string());
    let keys: jsonwebtoken::jwk::JwkSet =
        serde_json::from_value(get(document["jwks_uri"].as_str().unwrap())).unwrap();
    let (_, secret) = app.add_secret("s", "none");
    let token = app.with_secret(&secret).ok()["access_token"].as_str().unwrap().to_owned();
    let kid = jsonwebtoken::decode_header(&token).unwrap().kid.unwrap();
    let key = jsonwebtoken::DecodingKey::from_jwk(keys.find(&kid).unwrap()).unwrap();
    let mut validation = jsonwebtoken::Validation::new(Algorithm::ES256);
    validation.set_audience(&[&app.server.url]);
    validation.set_issuer(&["https://sts.windows.net/t1/"]);
    let claims = jsonwebtoken::decode::<Value>(&token, &key, &validation).unwrap().claims;
    assert_eq!(claims["appid"], app.client_id.as_str());
}

#[test]
fn a_federated_token_and_a_certificate_are_proofs() {
    let app = Application::new();
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["app".into()]).unwrap().self_signed(&pair).unwrap();
    let file = app.vault.dir.join("public.pem");
    std::fs::write(&file, certificate.pem()).unwrap();
    let sign = |claims: Value| {
        let key = EncodingKey::from_ec_der(&pair.serialize_der());
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &key).unwrap()
    };
    let subject = "system:serviceaccount:db:mysql";
    let token = |issuer: &str, subject: &str, audience: &str, exp: i64| {
        sign(json!({ "iss": issuer, "sub": subject, "aud": audience, "exp": exp }))
    };
    let exchange = "api://AzureADTokenExchange";
    let federated = token("https://cluster", subject, exchange, now() + 600);
    let refusal = refused(&app.with_assertion(&federated));
    assert_eq!(refusal, is(401, "invalid_client", 70021));
    let file = file.to_str().unwrap();
    app.vault.cli_json(&[
        "identity",
        "add-federated",
        "app",
        "--issuer",
        "https://cluster",
        "--subject",
        subject,
        "--keys-file",
        file,
    ]);
    app.works(app.with_assertion(&federated));
    for (bad, number) in [
        (token("https://other", subject, exchange, now() + 600), 70021),
        (token("https://cluster", "other", exchange, now() + 600), 70021),
        (token("https://cluster", subject, "other", now() + 600), 70021),
        (token("https://cluster", subject, exchange, now() - 600), 700024),
        ("nonsense".to_owned(), 50027),
    ] {
        assert_eq!(refused(&app.with_assertion(&bad)), is(401, "invalid_client", number));
    }

    let audience = format!("{}/t1/oauth2/v2.0/token", app.server.url);
    let own = token(&app.client_id, &app.client_id, &audience, now() + 600);
    assert_eq!(refused(&app.with_assertion(&own)).2, 70021);
    app.vault.cli_json(&["identity", "add-certificate", "app", "--file", file]);
    app.works(app.with_assertion(&own));
    let stranger = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let claims = json!({
        "iss": app.client_id, "sub": app.client_id, "aud": audience, "exp": now() + 600,
    });
    let key = EncodingKey::from_ec_der(&stranger.serialize_der());
    let forged = jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &key).unwrap();
    assert_eq!(refused(&app.with_assertion(&forged)), is(401, "invalid_client", 700027));
}
