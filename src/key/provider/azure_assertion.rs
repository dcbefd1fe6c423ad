//! The signed statement by which an application with a certificate shows that it is itself: a JWT
//! (RFC 7523) signed with RSASSA-PSS and SHA-256, naming the certificate by its SHA-256.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{RSA_PSS_SHA256, RsaKeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;

use crate::crypto::random;
use crate::crypto::secret::SecretString;
use crate::key::wall_clock;
use crate::sys::stack;

/// Of one statement, in seconds.
const LIFETIME: i64 = 600;

/// For `client_id` at the token endpoint `audience`. `pem` holds the certificate, whose issuers may
/// follow, and its private key. An error is for a person, without any of the file's content.
pub(super) fn assertion(
    pem: &SecretString,
    client_id: &str,
    audience: &str,
) -> Result<SecretString, String> {
    stack::with_burnt_stack(|| {
        let pem = pem.expose().as_bytes();
        let certificate = CertificateDer::from_pem_slice(pem)
            .map_err(|_| "holds no certificate in PEM form".to_owned())?;
        let key = key_pair(pem)?;
        let now = wall_clock();
        let id = random::bytes::<16>().map_err(|error| error.to_string())?;
        let thumbprint = URL_SAFE_NO_PAD.encode(digest(&SHA256, &certificate));
        let header = json!({"alg": "PS256", "typ": "JWT", "x5t#S256": thumbprint});
        let claims = json!({
            "aud": audience,
            "iss": client_id,
            "sub": client_id,
            "jti": URL_SAFE_NO_PAD.encode(id),
            "iat": now,
            "nbf": now,
            "exp": now + LIFETIME,
        });
        let encode = |part: serde_json::Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let mut jwt = format!("{}.{}", encode(header), encode(claims));
        let mut signature = vec![0; key.public().modulus_len()];
        key.sign(&RSA_PSS_SHA256, &SystemRandom::new(), jwt.as_bytes(), &mut signature)
            .map_err(|_| "the private key does not sign".to_owned())?;
        jwt.push('.');
        URL_SAFE_NO_PAD.encode_string(&signature, &mut jwt);
        SecretString::from_string_wiping(jwt).map_err(|error| error.to_string())
    })
}

fn key_pair(pem: &[u8]) -> Result<RsaKeyPair, String> {
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|_| {
        if pem.windows(9).any(|word| word == b"ENCRYPTED") {
            "its private key is encrypted: keep it without a password, mode 0600".to_owned()
        } else {
            "holds no private key in PEM form".to_owned()
        }
    })?;
    let pair = match &key {
        PrivateKeyDer::Pkcs8(key) => RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()),
        PrivateKeyDer::Pkcs1(key) => RsaKeyPair::from_der(key.secret_pkcs1_der()),
        _ => return Err("its private key is not an RSA key".to_owned()),
    };
    pair.map_err(|why| format!("its private key is not an RSA key of 2048 to 4096 bits ({why})"))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::LazyLock;

    use aws_lc_rs::encoding::AsDer;
    use ring::signature::{RSA_PSS_2048_8192_SHA256, UnparsedPublicKey};
    use serde_json::Value;

    use super::*;

    /// A certificate with its key in PEM, and the public key in DER (PKCS#1).
    pub(in super::super) struct Made {
        pub pem: String,
        pub public: Vec<u8>,
        pub certificate: Vec<u8>,
    }

    pub(in super::super) static MADE: LazyLock<Made> = LazyLock::new(|| {
        use aws_lc_rs::rsa::{KeyPair, KeySize};
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let der: aws_lc_rs::encoding::Pkcs8V1Der = pair.as_der().unwrap();
        let key = rcgen::KeyPair::try_from(der.as_ref()).unwrap();
        let made = rcgen::CertificateParams::new(vec!["app.example".to_owned()]).unwrap();
        let certificate = made.self_signed(&key).unwrap();
        let public = RsaKeyPair::from_pkcs8(der.as_ref()).unwrap();
        Made {
            pem: format!("{}{}", certificate.pem(), key.serialize_pem()),
            public: public.public().as_ref().to_vec(),
            certificate: certificate.der().to_vec(),
        }
    });

    /// Header and claims of a statement whose signature is good.
    pub(in super::super) fn verified(jwt: &str, public: &[u8]) -> (Value, Value) {
        let (signed, signature) = jwt.rsplit_once('.').unwrap();
        let key = UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA256, public);
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
        key.verify(signed.as_bytes(), &signature).unwrap();
        let (header, claims) = signed.split_once('.').unwrap();
        let part = |text| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap();
        (part(header), part(claims))
    }

    fn secret(text: &str) -> SecretString {
        SecretString::from_string_wiping(text.to_owned()).unwrap()
    }

    #[test]
    fn a_statement_verifies_and_names_all_it_must() {
        let made = &*MADE;
        let before = wall_clock();
        let jwt = assertion(&secret(&made.pem), "app-1", "https://login.example/t/x").unwrap();
        let (header, claims) = verified(jwt.expose(), &made.public);
        assert_eq!(header["alg"], "PS256");
        let thumbprint = URL_SAFE_NO_PAD.encode(digest(&SHA256, &made.certificate));
        assert_eq!(header["x5t#S256"], thumbprint.as_str());
        assert_eq!((&claims["iss"], &claims["sub"]), (&json!("app-1"), &json!("app-1")));
        assert_eq!(claims["aud"], "https://login.example/t/x");
        let (start, end) = (claims["nbf"].as_i64().unwrap(), claims["exp"].as_i64().unwrap());
        assert!((before..=wall_clock()).contains(&start));
        assert_eq!(end - start, LIFETIME);
        let again = assertion(&secret(&made.pem), "app-1", "https://login.example/t/x").unwrap();
        assert_ne!(verified(again.expose(), &made.public).1["jti"], claims["jti"]);
    }

    #[test]
    fn other_files_are_refused_without_their_content() {
        let whole = &MADE.pem;
        let key_at = whole.find("-----BEGIN PRIVATE").unwrap();
        let (certificate, key) = whole.split_at(key_at);
        let ec = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        for (pem, part) in [
            ("nothing".to_owned(), "no certificate"),
            (key.to_owned(), "no certificate"),
            (certificate.to_owned(), "no private key"),
            (format!("{certificate}{ec}"), "not an RSA key"),
            (format!("{certificate}{encrypted}"), "is encrypted"),
        ] {
            let why = assertion(&secret(&pem), "app-1", "https://x/").unwrap_err();
            assert!(why.contains(part), "{why}");
            assert!(!why.contains("MII"), "{why}");
        }
    }
}
