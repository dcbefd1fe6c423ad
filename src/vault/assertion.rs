//! Client assertions: JWTs that an identity proves itself with instead of a secret, signed by its
//! certificate's key or by an issuer that it is federated with.

use aws_lc_rs::digest::{Algorithm as Digest, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;

use super::codec;
use super::store::credentials::Proof;

/// Clocks need not agree to the second.
const LEEWAY: i64 = 300;
const RSA: [Algorithm; 4] =
    [Algorithm::RS256, Algorithm::PS256, Algorithm::RS384, Algorithm::RS512];
const EC: [Algorithm; 1] = [Algorithm::ES256];

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    /// Seconds that some clients write with a fraction.
    exp: f64,
    nbf: Option<f64>,
}

/// Why an assertion is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unproven {
    /// Signed by none of the identity's credentials.
    Signature,
    Expired,
    /// Whose issuer, subject or audience is that of none of its federations.
    NoMatch,
    Malformed,
}

/// Is `proof` material that assertions can be checked with?
pub(crate) fn is_usable(proof: &Proof) -> bool {
    match proof {
        Proof::Secret { .. } => true,
        Proof::Certificate { pem } => {
            CertificateDer::from_pem_slice(pem.as_bytes()).is_ok() && pem_key(pem).is_some()
        }
        Proof::Federated { keys, .. } => {
            serde_json::from_str::<JwkSet>(keys).is_ok_and(|set| !set.keys.is_empty())
                || pem_key(keys).is_some()
        }
    }
}

/// Does one of `proofs` vouch for it? `audiences` are the names of the endpoint that it was sent to.
pub(crate) fn check(
    assertion: &str,
    client_id: &str,
    audiences: &[String],
    proofs: &[Proof],
    now: i64,
) -> Result<(), Unproven> {
    let header = jsonwebtoken::decode_header(assertion).map_err(|_| Unproven::Malformed)?;
    // Of several reasons, the one that came nearest to a yes.
    let mut nearest = Unproven::NoMatch;
    for proof in proofs {
        let reason = match check_one(assertion, &header, client_id, audiences, proof, now) {
            Ok(()) => return Ok(()),
            Err(reason) => reason,
        };
        nearest = match (nearest, reason) {
            (Unproven::Expired, _) | (_, Unproven::Expired) => Unproven::Expired,
            (Unproven::Signature, _) | (_, Unproven::Signature) => Unproven::Signature,
            (_, reason) => reason,
        };
    }
    Err(nearest)
}

fn check_one(
    assertion: &str,
    header: &Header,
    client_id: &str,
    audiences: &[String],
    proof: &Proof,
    now: i64,
) -> Result<(), Unproven> {
    match proof {
        Proof::Secret { .. } => Err(Unproven::NoMatch),
        Proof::Certificate { pem } => {
            if !names_certificate(header, pem) {
                return Err(Unproven::Signature);
            }
            let key = pem_key(pem).ok_or(Unproven::Signature)?;
            let claims = decode(assertion, header, &key, audiences)?;
            if claims.iss != client_id || claims.sub != client_id {
                return Err(Unproven::NoMatch);
            }
            in_time(&claims, now)
        }
        Proof::Federated { issuer, subject, audience, keys } => {
            let key = federated_key(header, keys).ok_or(Unproven::Signature)?;
            let claims = decode(assertion, header, &key, std::slice::from_ref(audience))?;
            if claims.iss != *issuer || claims.sub != *subject {
                return Err(Unproven::NoMatch);
            }
            in_time(&claims, now)
        }
    }
}

fn decode(
    assertion: &str,
    header: &Header,
    (key, algorithms): &(DecodingKey, &'static [Algorithm]),
    audiences: &[String],
) -> Result<Claims, Unproven> {
    use jsonwebtoken::errors::ErrorKind;
    if !algorithms.contains(&header.alg) {
        return Err(Unproven::Signature);
    }
    let mut validation = Validation::new(header.alg);
    // Times are compared by the vault's clock.
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
    validation.set_audience(audiences);
    jsonwebtoken::decode::<Claims>(assertion, key, &validation).map(|token| token.claims).map_err(
        |error| match error.kind() {
            ErrorKind::InvalidSignature => Unproven::Signature,
            ErrorKind::InvalidAudience | ErrorKind::MissingRequiredClaim(_) => Unproven::NoMatch,
            _ => Unproven::Malformed,
        },
    )
}

fn in_time(claims: &Claims, now: i64) -> Result<(), Unproven> {
    let begun = claims.nbf.is_none_or(|nbf| nbf <= (now + LEEWAY) as f64);
    if begun && claims.exp > (now - LEEWAY) as f64 { Ok(()) } else { Err(Unproven::Expired) }
}

/// A header that names a certificate must name this one.
fn names_certificate(header: &Header, pem: &str) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem.as_bytes()) else { return false };
    let thumbprint = |algorithm: &'static Digest| digest(algorithm, &der).as_ref().to_vec();
    let matches = |named: &Option<String>, algorithm: &'static Digest| {
        named.as_deref().is_none_or(|named| {
            codec::from_base64url(named).is_some_and(|bytes| bytes == thumbprint(algorithm))
        })
    };
    matches(&header.x5t, &SHA1_FOR_LEGACY_USE_ONLY) && matches(&header.x5t_s256, &SHA256)
}

fn federated_key(header: &Header, keys: &str) -> Option<(DecodingKey, &'static [Algorithm])> {
    let Ok(set) = serde_json::from_str::<JwkSet>(keys) else { return pem_key(keys) };
    let jwk = match &header.kid {
        Some(kid) => set.find(kid)?,
        None => set.keys.first().filter(|_| set.keys.len() == 1)?,
    };
    let algorithms: &[Algorithm] = match jwk.algorithm {
        jsonwebtoken::jwk::AlgorithmParameters::RSA(_) => &RSA,
        jsonwebtoken::jwk::AlgorithmParameters::EllipticCurve(_) => &EC,
        _ => return None,
    };
    Some((DecodingKey::from_jwk(jwk).ok()?, algorithms))
}

/// Of a certificate or a public key.
fn pem_key(pem: &str) -> Option<(DecodingKey, &'static [Algorithm])> {
    let rsa = DecodingKey::from_rsa_pem(pem.as_bytes()).map(|key| (key, &RSA[..]));
    rsa.or_else(|_| DecodingKey::from_ec_pem(pem.as_bytes()).map(|key| (key, &EC[..]))).ok()
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::EncodingKey;
    use serde_json::{Value, json};

    use super::*;

    const NOW: i64 = 1_000_000;

    /// A key that signs, and its public half as a JWKS.
    fn issuer(kid: &str) -> (EncodingKey, String) {
        let key = crate::vault::token::new_signing_key().unwrap();
        let authority = crate::vault::token::TokenAuthority::new(&key, 60).unwrap();
        let mut jwk = authority.jwk().clone();
        jwk["kid"] = json!(kid);
        (EncodingKey::from_ec_der(key.expose()), json!({ "keys": [jwk] }).to_string())
    }

    fn sign(key: &EncodingKey, kid: &str, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(kid.into());
        jsonwebtoken::encode(&header, claims, key).unwrap()
    }

    #[test]
    fn a_federated_token_must_match_in_every_part() {
        let (key, keys) = issuer("k1");
        let (other_key, _) = issuer("k1");
        let proof = Proof::Federated {
            issuer: "https://cluster".into(),
            subject: "system:serviceaccount:db:mysql".into(),
            audience: "api://AzureADTokenExchange".into(),
            keys,
        };
        assert!(is_usable(&proof));
        let good = json!({
            "iss": "https://cluster", "sub": "system:serviceaccount:db:mysql",
            "aud": ["api://AzureADTokenExchange"], "exp": NOW + 600, "nbf": NOW,
        });
        let proofs = [proof];
        let judge = |key: &EncodingKey, kid: &str, claims: &Value, now: i64| {
            check(&sign(key, kid, claims), "client", &[], &proofs, now)
        };
        assert_eq!(judge(&key, "k1", &good, NOW), Ok(()));
        assert_eq!(judge(&other_key, "k1", &good, NOW), Err(Unproven::Signature));
        assert_eq!(judge(&key, "k2", &good, NOW), Err(Unproven::Signature));
        assert_eq!(judge(&key, "k1", &good, NOW + 900), Err(Unproven::Expired));
        assert_eq!(judge(&key, "k1", &good, NOW - 301), Err(Unproven::Expired));
        for (name, value) in [("iss", "x"), ("sub", "x"), ("aud", "x")] {
            let mut wrong = good.clone();
            wrong[name] = json!(value);
            assert_eq!(judge(&key, "k1", &wrong, NOW), Err(Unproven::NoMatch), "{name}");
        }
        assert_eq!(check("a.b.c", "client", &[], &proofs, NOW), Err(Unproven::Malformed));
        assert_eq!(
            check(&sign(&key, "k1", &good), "client", &[], &[], NOW),
            Err(Unproven::NoMatch)
        );
    }

    #[test]
    fn a_certificate_signs_for_its_client_alone() {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let certificate =
            rcgen::CertificateParams::new(vec!["db".into()]).unwrap().self_signed(&pair).unwrap();
        let proofs = [Proof::Certificate { pem: certificate.pem() }];
        assert!(is_usable(&proofs[0]));
        let key = EncodingKey::from_ec_der(&pair.serialize_der());
        let audience = "https://login/t/oauth2/v2.0/token".to_owned();
        let good = json!({ "iss": "c1", "sub": "c1", "aud": audience, "exp": NOW as f64 + 600.5 });
        let sign = |thumbprint: &[u8], claims: &Value| {
            let mut header = Header::new(Algorithm::ES256);
            header.x5t_s256 = Some(codec::to_base64url(thumbprint));
            jsonwebtoken::encode(&header, claims, &key).unwrap()
        };
        let thumbprint = digest(&SHA256, certificate.der()).as_ref().to_vec();
        let judge = |assertion: &str, client: &str| {
            check(assertion, client, std::slice::from_ref(&audience), &proofs, NOW)
        };
        assert_eq!(judge(&sign(&thumbprint, &good), "c1"), Ok(()));
        assert_eq!(judge(&sign(&thumbprint, &good), "c2"), Err(Unproven::NoMatch));
        assert_eq!(judge(&sign(&[0; 32], &good), "c1"), Err(Unproven::Signature));
        let mut elsewhere = good.clone();
        elsewhere["aud"] = json!("https://elsewhere/token");
        assert_eq!(judge(&sign(&thumbprint, &elsewhere), "c1"), Err(Unproven::NoMatch));
        assert!(!is_usable(&Proof::Certificate { pem: "nonsense".into() }));
    }
}
