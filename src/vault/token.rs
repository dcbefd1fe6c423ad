//! Access tokens: issued by the identity endpoint, checked on every request.
//!
//! JWTs signed with ES256 under a key that only this vault has. A token says who (`oid`,
//! `appid`), for whom (`aud`), from whom (`iss`, `tid`) and how long (`nbf`, `exp`); a check
//! passes only if all of these hold. Whether the identity still exists is the caller's question.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use jsonwebtoken::errors::ErrorKind as JwtError;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};

use super::codec;
use super::refusal::Refusal;

/// A token is valid this long before it is issued, so that clocks need not agree to the second.
const VALID_BEFORE_ISSUE: i64 = 300;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Claims {
    pub(crate) aud: String,
    pub(crate) iss: String,
    pub(crate) iat: i64,
    pub(crate) nbf: i64,
    pub(crate) exp: i64,
    pub(crate) appid: String,
    pub(crate) oid: String,
    pub(crate) sub: String,
    pub(crate) tid: String,
    pub(crate) ver: String,
}

pub(crate) struct TokenAuthority {
    signing: EncodingKey,
    verifying: DecodingKey,
    header: Header,
    /// The public key as a JSON Web Key.
    jwk: Value,
    /// Seconds.
    lifetime: i64,
    /// Of a drill; 0: none.
    drill_lifetime: AtomicI64,
}

/// Whom a token is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) object_id: &'a str,
    pub(crate) client_id: &'a str,
    pub(crate) tenant: &'a str,
}

pub(crate) fn issuer(tenant: &str) -> String {
    format!("https://sts.windows.net/{tenant}/")
}

/// A new signing key (PKCS#8).
pub(crate) fn new_signing_key() -> Result<SecretBytes> {
    let document = EcdsaKeyPair::generate_pkcs8(
        &ECDSA_P256_SHA256_FIXED_SIGNING,
        &aws_lc_rs::rand::SystemRandom::new(),
    )
    .map_err(|_| Error::new(Kind::Io, "cannot make a key to sign tokens"))?;
    SecretBytes::new_with(document.as_ref().len(), |place| {
        place.copy_from_slice(document.as_ref());
    })
}

impl TokenAuthority {
    /// `lifetime` in seconds.
    pub(crate) fn new(key: &SecretBytes, lifetime: i64) -> Result<TokenAuthority> {
        let unusable = || Error::corrupt("the vault's key to sign tokens is unusable");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.expose())
            .map_err(|_| unusable())?;
        // Uncompressed point: 4 | x | y.
        let point = pair.public_key().as_ref();
        if point.len() != 65 {
            return Err(unusable());
        }
        let verifying = DecodingKey::from_ec_components(
            &codec::to_base64url(&point[1..33]),
            &codec::to_base64url(&point[33..]),
        )
        .map_err(|error| unusable().with_source(error))?;
        let mut header = Header::new(Algorithm::ES256);
        let kid = codec::to_hex(&point[1..17]);
        let jwk = json!({
            "kty": "EC",
            "use": "sig",
            "crv": "P-256",
            "alg": "ES256",
            "kid": kid,
            "x": codec::to_base64url(&point[1..33]),
            "y": codec::to_base64url(&point[33..]),
        });
        header.kid = Some(kid);
        Ok(TokenAuthority {
            signing: EncodingKey::from_ec_der(key.expose()),
            verifying,
            header,
            jwk,
            lifetime,
            drill_lifetime: AtomicI64::new(0),
        })
    }

    /// What others verify tokens with.
    pub(crate) fn jwk(&self) -> &Value {
        &self.jwk
    }

    /// For a drill: holds for tokens issued from now on, until it is None again.
    pub(crate) fn override_lifetime(&self, seconds: Option<i64>) {
        self.drill_lifetime.store(seconds.unwrap_or(0), Ordering::Relaxed);
    }

    fn lifetime(&self) -> i64 {
        match self.drill_lifetime.load(Ordering::Relaxed) {
            0 => self.lifetime,
            seconds => seconds,
        }
    }

    /// A token and the second it expires at.
    pub(crate) fn issue(
        &self,
        subject: Subject<'_>,
        audience: &str,
        now: i64,
    ) -> Result<(String, i64)> {
        let claims = Claims {
            aud: audience.to_owned(),
            iss: issuer(subject.tenant),
            iat: now,
            nbf: now - VALID_BEFORE_ISSUE,
            exp: now + self.lifetime(),
            appid: subject.client_id.to_owned(),
            oid: subject.object_id.to_owned(),
            sub: subject.object_id.to_owned(),
            tid: subject.tenant.to_owned(),
            ver: "1.0".to_owned(),
        };
        let token = jsonwebtoken::encode(&self.header, &claims, &self.signing)
            .map_err(|error| Error::new(Kind::Io, "cannot sign a token").with_source(error))?;
        Ok((token, claims.exp))
    }

    /// Checks all of a token but the existence of its identity.
    pub(crate) fn verify(
        &self,
        token: &str,
        tenant: &str,
        resource: &str,
        now: i64,
    ) -> Result<Claims, Refusal> {
        // The library reads the system's clock; times are compared here, by the vault's.
        let mut validation = Validation::new(Algorithm::ES256);
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss"]);
        validation.set_issuer(&[issuer(tenant)]);
        validation.set_audience(&[resource.to_owned(), format!("{resource}/")]);
        let claims = jsonwebtoken::decode::<Claims>(token, &self.verifying, &validation)
            .map_err(|error| refusal(error.kind(), resource))?
            .claims;
        if claims.tid != tenant {
            return Err(Refusal::unauthorized("Error validating token: wrong tenant."));
        }
        if claims.exp <= now {
            return Err(Refusal::unauthorized("Error validating token: the token has expired."));
        }
        if claims.nbf > now {
            return Err(Refusal::unauthorized(
                "Error validating token: the token is not yet valid.",
            ));
        }
        Ok(claims)
    }
}

/// Only AKV10000 is a confirmed number; AKV10022 and AKV10032 are what clients have been seen to
/// quote. The rest goes without.
fn refusal(kind: &JwtError, resource: &str) -> Refusal {
    Refusal::unauthorized(match kind {
        JwtError::InvalidAudience => {
            format!("AKV10022: Invalid audience. Expected {resource}.")
        }
        JwtError::InvalidIssuer => "AKV10032: Invalid issuer.".to_owned(),
        JwtError::InvalidSignature => {
            "Error validating token: the signature is invalid.".to_owned()
        }
        _ => "Error validating token: it is malformed.".to_owned(),
    })
}

impl fmt::Debug for TokenAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenAuthority").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUDIENCE: &str = "https://127.0.0.1:8443";

    fn authority() -> TokenAuthority {
        TokenAuthority::new(&new_signing_key().unwrap(), 3600).unwrap()
    }

    fn subject(tenant: &str) -> Subject<'_> {
        Subject { object_id: "oid", client_id: "app", tenant }
    }

    #[test]
    fn a_token_is_good_for_its_audience_until_it_expires() {
        let authority = authority();
        let (token, expires) = authority.issue(subject("t1"), AUDIENCE, 1000).unwrap();
        assert_eq!(expires, 4600);
        let claims = authority.verify(&token, "t1", AUDIENCE, 4599).unwrap();
        assert_eq!((claims.oid.as_str(), claims.appid.as_str()), ("oid", "app"));
        for (resource, now) in [
            (AUDIENCE, 4600),
            (AUDIENCE, 699),
            ("https://127.0.0.1:8444", 1000),
            ("https://vault.azure.net", 1000),
        ] {
            let refusal = authority.verify(&token, "t1", resource, now).unwrap_err();
            assert_eq!(refusal.status, 401, "{resource} at {now}");
        }
        let (token, _) = authority.issue(subject("t1"), "https://127.0.0.1:8443/", 1000).unwrap();
        authority.verify(&token, "t1", AUDIENCE, 1000).unwrap();
    }

    #[test]
    fn tokens_of_another_key_or_tenant_are_refused() {
        let (mine, other) = (authority(), authority());
        let (token, _) = other.issue(subject("t1"), AUDIENCE, 1000).unwrap();
        let refusal = mine.verify(&token, "t1", AUDIENCE, 1000).unwrap_err();
        assert!(refusal.message.contains("signature"));
        let (token, _) = mine.issue(subject("t2"), AUDIENCE, 1000).unwrap();
        let refusal = mine.verify(&token, "t1", AUDIENCE, 1000).unwrap_err();
        assert!(refusal.message.contains("AKV10032"));
        mine.verify(&token, "t2", AUDIENCE, 1000).unwrap();
    }

    #[test]
    fn changed_unsigned_and_malformed_tokens_are_refused() {
        let authority = authority();
        let (token, _) = authority.issue(subject("t1"), AUDIENCE, 1000).unwrap();
        let parts: Vec<&str> = token.split('.').collect();
        let claims = String::from_utf8(codec::from_base64url(parts[1]).unwrap()).unwrap();
        let forged =
            codec::to_base64url(claims.replace("\"oid\":\"oid\"", "\"oid\":\"adm\"").as_bytes());
        let none = codec::to_base64url(br#"{"alg":"none","typ":"JWT"}"#);
        let hs256 = codec::to_base64url(br#"{"alg":"HS256","typ":"JWT"}"#);
        for bad in [
            format!("{}.{}.{}", parts[0], forged, parts[2]),
            format!("{}.{}.", none, parts[1]),
            format!("{}.{}.{}", none, parts[1], parts[2]),
            format!("{}.{}.{}", hs256, parts[1], parts[2]),
            format!("{}.{}", parts[0], parts[1]),
            "x".to_owned(),
            String::new(),
            "..".to_owned(),
        ] {
            assert_eq!(
                authority.verify(&bad, "t1", AUDIENCE, 1000).unwrap_err().status,
                401,
                "{bad}"
            );
        }
    }
}
