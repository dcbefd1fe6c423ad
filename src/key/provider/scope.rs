//! Which keys one section of the configuration is for: the beginning of their ids.
//!
//! An id is compared by its parts, never as text: `https://kv.example` is no beginning of
//! `https://kv.example.evil/keys/kek`, whose server would be given the other's token.

use super::azure::VaultScope;
use super::pkcs11::{SCHEME, TokenScope};

/// A vault, a key of one, every token, or one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope(Kind);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Vault(VaultScope),
    Tokens(TokenScope),
}

impl Scope {
    /// The error says why `text` is no beginning of a key's id.
    pub fn parse(text: &str) -> Result<Scope, String> {
        let kind = if text.starts_with(SCHEME) {
            TokenScope::parse(text).map(Kind::Tokens)
        } else if text.starts_with("https://") {
            VaultScope::parse(text).map(Kind::Vault)
        } else {
            Err("neither https:// nor pkcs11:".into())
        };
        kind.map(Scope).map_err(|why| {
            format!(
                "\"{text}\" is not the beginning of a key's id ({why}): expected https://HOST/, \
                 https://HOST/keys/NAME, {SCHEME} or {SCHEME}token=TOKEN"
            )
        })
    }

    /// How closely it fits the key, the larger the closer; None: it is not for this key.
    pub fn fit(&self, kid: &str) -> Option<usize> {
        match &self.0 {
            Kind::Vault(scope) => scope.fit(kid),
            Kind::Tokens(scope) => scope.fit(kid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(scope: &str, kid: &str) -> Option<usize> {
        Scope::parse(scope).unwrap().fit(kid)
    }

    #[test]
    fn a_vault_is_for_its_keys_and_no_others() {
        let kid = "https://kv1.vault.azure.net/keys/kek/0123";
        for vault in [
            "https://kv1.vault.azure.net",
            "https://kv1.vault.azure.net/",
            "https://KV1.vault.azure.net:443/keys/",
        ] {
            assert_eq!(fit(vault, kid), Some(0), "{vault}");
            assert_eq!(fit(vault, "https://kv1.vault.azure.net/keys/kek"), Some(0), "{vault}");
        }
        for key in ["https://kv1.vault.azure.net/keys/kek", "https://kv1.vault.azure.net/keys/KEK/"]
        {
            assert_eq!(fit(key, kid), Some(1), "{key}");
        }
        for other in [
            "https://kv1.vault.azure",
            "https://kv1.vault.azure.net:8443/",
            "https://kv1.vault.azure.net/keys/ke",
            "https://vault.azure.net/",
            "pkcs11:",
        ] {
            assert_eq!(fit(other, kid), None, "{other}");
        }
        let evil = "https://kv1.vault.azure.net.evil.example/keys/kek";
        assert_eq!(fit("https://kv1.vault.azure.net", evil), None);
        assert_eq!(
            fit("https://kv1.vault.azure.net", "https://kv1.vault.azure.net@evil/keys/k"),
            None
        );
    }

    #[test]
    fn a_token_is_for_its_keys_and_no_others() {
        let kid = "pkcs11:token=My%20HSM;serial=7;object=kek;id=%01";
        for (scope, expected) in [
            ("pkcs11:", Some(0)),
            ("pkcs11:token=My%20HSM", Some(1)),
            ("pkcs11:serial=7;token=My%20HSM", Some(2)),
            ("pkcs11:token=My", None),
            ("pkcs11:token=My%20HSM;serial=8", None),
            ("https://My%20HSM.example/", None),
        ] {
            assert_eq!(
                Scope::parse(scope).ok().and_then(|scope| scope.fit(kid)),
                expected,
                "{scope}"
            );
        }
        assert_eq!(fit("pkcs11:token=a;serial=7", "pkcs11:token=a;object=kek"), None);
        assert_eq!(fit("pkcs11:", "https://kv/keys/kek"), None);
    }

    #[test]
    fn what_begins_no_key_is_refused() {
        for bad in [
            "",
            "kv1",
            "http://kv1.vault.azure.net/",
            "https://",
            "https:///keys/kek",
            "https://kv1/secrets/x",
            "https://kv1/keys/kek/0123",
            "https://kv1/keys/a_b",
            "https://user@kv1/",
            "https://kv1/?x=1",
            "pkcs11:object=kek",
            "pkcs11:token=x;object=kek",
            "pkcs11:token=x;id=%01",
            "pkcs11:serial=7",
            "pkcs11:token=",
            "pkcs11:slot-id=1",
            "pkcs11:token=x?pin-value=1",
        ] {
            let why = Scope::parse(bad).unwrap_err();
            assert!(why.contains(bad), "{why}");
        }
    }

    #[test]
    fn the_same_scope_in_other_words_is_the_same() {
        for (one, other) in [
            ("https://KV1.example", "https://kv1.example:443/keys/"),
            ("https://kv1.example/keys/KEK", "https://kv1.example/keys/kek/"),
            ("pkcs11:token=a%62", "pkcs11:token=%61b;"),
        ] {
            assert_eq!(Scope::parse(one), Scope::parse(other));
        }
    }
}
