//! The official Rust clients, unchanged, against the embedded key vault.
//!
//! `scripts/suites.d/azure-clients.sh` prepares the vaults and the environment. Challenge
//! verification is on: the vaults are asked under their names, not by address.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::sync::Arc;

use azure_core::credentials::{Secret, TokenCredential};
use azure_core::http::StatusCode;
use azure_identity::{ClientSecretCredential, ManagedIdentityCredential};
use azure_security_keyvault_keys::models::*;
use azure_security_keyvault_keys::{KeyClient, KeyClientOptions, ResourceExt as _};
use futures::TryStreamExt as _;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Beyond one page.
const LISTED: usize = 30;

fn variable(name: &str) -> Result<String> {
    std::env::var(name).map_err(|_| format!("{name} is not set").into())
}

fn client(url: &str, credential: Arc<dyn TokenCredential>) -> Result<KeyClient> {
    let options = KeyClientOptions { verify_challenge_resource: Some(true), ..Default::default() };
    Ok(KeyClient::new(url, credential, Some(options))?)
}

fn new_key(kty: KeyType, size: i32) -> CreateKeyParameters {
    CreateKeyParameters { kty: Some(kty), key_size: Some(size), ..Default::default() }
}

fn operation(algorithm: EncryptionAlgorithm, value: Vec<u8>) -> KeyOperationParameters {
    KeyOperationParameters { algorithm: Some(algorithm), value: Some(value), ..Default::default() }
}

fn status<T>(result: azure_core::Result<T>) -> Option<StatusCode> {
    result.err().and_then(|error| error.http_status())
}

async fn create(client: &KeyClient, name: &str, parameters: CreateKeyParameters) -> Result<Key> {
    Ok(client.create_key(name, parameters.try_into()?, None).await?.into_model()?)
}

async fn life(client: &KeyClient) -> Result {
    let made = create(client, "rust-life", new_key(KeyType::Rsa, 3072)).await?;
    let id = made.resource_id()?;
    assert_eq!(made.key.as_ref().and_then(|key| key.n.as_ref()).map(Vec::len), Some(384));
    let options = KeyClientGetKeyOptions { key_version: id.version.clone(), ..Default::default() };
    let got = client.get_key("rust-life", Some(options)).await?.into_model()?;
    assert_eq!(got.resource_id()?.source_id, id.source_id);
    let newest = client.get_key("rust-life", None).await?.into_model()?;
    assert_eq!(newest.resource_id()?.source_id, id.source_id);
    let update = UpdateKeyPropertiesParameters {
        tags: Some(HashMap::from([("a".to_owned(), "b".to_owned())])),
        ..Default::default()
    };
    let updated =
        client.update_key_properties("rust-life", update.try_into()?, None).await?.into_model()?;
    assert_eq!(updated.tags.as_ref().and_then(|tags| tags.get("a")).map(String::as_str), Some("b"));
    create(client, "rust-life", new_key(KeyType::RsaHsm, 2048)).await?;
    let versions: Vec<_> =
        client.list_key_properties_versions("rust-life", None)?.try_collect().await?;
    assert_eq!(versions.len(), 2);
    assert_eq!(status(client.get_key("rust-none", None).await), Some(StatusCode::NotFound));
    Ok(())
}

async fn lists(client: &KeyClient) -> Result {
    let mut names = HashSet::new();
    for number in 0..LISTED {
        let name = format!("rust-page-{number}");
        create(client, &name, new_key(KeyType::Rsa, 2048)).await?;
        names.insert(name);
    }
    let listed: Vec<KeyProperties> = client.list_key_properties(None)?.try_collect().await?;
    for one in &listed {
        names.remove(&one.resource_id()?.name);
    }
    assert!(names.is_empty(), "not listed: {names:?}");
    Ok(())
}

async fn deletion(client: &KeyClient) -> Result {
    let made = create(client, "rust-gone", new_key(KeyType::Rsa, 2048)).await?;
    let deleted = client.delete_key("rust-gone", None).await?.into_model()?;
    assert!(deleted.recovery_id.is_some() && deleted.scheduled_purge_date.is_some());
    assert_eq!(status(client.get_key("rust-gone", None).await), Some(StatusCode::NotFound));
    let conflict =
        client.create_key("rust-gone", new_key(KeyType::Rsa, 2048).try_into()?, None).await;
    assert_eq!(status(conflict), Some(StatusCode::Conflict));
    let all: Vec<DeletedKeyProperties> =
        client.list_deleted_key_properties(None)?.try_collect().await?;
    assert!(!all.is_empty());
    client.get_deleted_key("rust-gone", None).await?.into_model()?;
    let back = client.recover_deleted_key("rust-gone", None).await?.into_model()?;
    assert_eq!(back.resource_id()?.source_id, made.resource_id()?.source_id);

    let backup = client.backup_key("rust-gone", None).await?.into_model()?;
    client.delete_key("rust-gone", None).await?;
    client.purge_deleted_key("rust-gone", None).await?;
    let restore = RestoreKeyParameters { key_backup: backup.value };
    let restored = client.restore_key(restore.try_into()?, None).await?.into_model()?;
    assert_eq!(restored.resource_id()?.source_id, made.resource_id()?.source_id);
    Ok(())
}

async fn rotation(client: &KeyClient) -> Result {
    let before = create(client, "rust-turn", new_key(KeyType::Rsa, 2048)).await?;
    let policy = KeyRotationPolicy {
        lifetime_actions: Some(vec![LifetimeAction {
            action: Some(LifetimeActionType { type_prop: Some(KeyRotationPolicyAction::Rotate) }),
            trigger: Some(LifetimeActionTrigger {
                time_after_create: Some("P2M".to_owned()),
                ..Default::default()
            }),
        }]),
        attributes: Some(KeyRotationPolicyAttributes {
            expiry_time: Some("P90D".to_owned()),
            ..Default::default()
        }),
        ..Default::default()
    };
    client.update_key_rotation_policy("rust-turn", policy.try_into()?, None).await?;
    let got = client.get_key_rotation_policy("rust-turn", None).await?.into_model()?;
    let expiry = got.attributes.and_then(|attributes| attributes.expiry_time);
    assert_eq!(expiry.as_deref(), Some("P90D"));
    let rotated = client.rotate_key("rust-turn", None).await?.into_model()?;
    assert_ne!(rotated.resource_id()?.version, before.resource_id()?.version);
    assert!(rotated.attributes.and_then(|attributes| attributes.expires).is_some());
    Ok(())
}

async fn cryptography(client: &KeyClient) -> Result {
    let key = create(client, "rust-crypto", new_key(KeyType::Rsa, 2048)).await?;
    let version = key.resource_id()?.version.ok_or("the key has no version")?;
    let secret = vec![7; 32];
    for algorithm in
        [EncryptionAlgorithm::RsaOaep, EncryptionAlgorithm::RsaOaep256, EncryptionAlgorithm::Rsa1_5]
    {
        // Without a version: the newest, by a path with an empty segment.
        let parameters = operation(algorithm.clone(), secret.clone());
        let wrapped =
            client.wrap_key("rust-crypto", parameters.try_into()?, None).await?.into_model()?;
        let value = wrapped.result.ok_or("nothing was wrapped")?;
        for version in [version.as_str(), ""] {
            let parameters = operation(algorithm.clone(), value.clone());
            let opened = client
                .unwrap_key("rust-crypto", version, parameters.try_into()?, None)
                .await?
                .into_model()?;
            assert_eq!(opened.result, Some(secret.clone()));
        }
        let parameters = operation(algorithm.clone(), secret.clone());
        let sealed =
            client.encrypt("rust-crypto", parameters.try_into()?, None).await?.into_model()?;
        let parameters = operation(algorithm, sealed.result.ok_or("nothing was encrypted")?);
        let opened = client
            .decrypt("rust-crypto", &version, parameters.try_into()?, None)
            .await?
            .into_model()?;
        assert_eq!(opened.result, Some(secret.clone()));
    }
    for algorithm in [SignatureAlgorithm::Rs256, SignatureAlgorithm::Ps512] {
        let digest = match algorithm {
            SignatureAlgorithm::Rs256 => vec![5; 32],
            _ => vec![5; 64],
        };
        let parameters =
            SignParameters { algorithm: Some(algorithm.clone()), value: Some(digest.clone()) };
        let signed =
            client.sign("rust-crypto", parameters.try_into()?, None).await?.into_model()?;
        let parameters = VerifyParameters {
            algorithm: Some(algorithm),
            digest: Some(digest),
            signature: signed.result,
        };
        let verified = client
            .verify("rust-crypto", &version, parameters.try_into()?, None)
            .await?
            .into_model()?;
        assert_eq!(verified.value, Some(true));
    }
    let disable = UpdateKeyPropertiesParameters {
        key_attributes: Some(KeyAttributes { enabled: Some(false), ..Default::default() }),
        ..Default::default()
    };
    client.update_key_properties("rust-crypto", disable.try_into()?, None).await?;
    let parameters = operation(EncryptionAlgorithm::RsaOaep256, vec![1; 256]);
    let refused = client.unwrap_key("rust-crypto", &version, parameters.try_into()?, None).await;
    assert_eq!(status(refused), Some(StatusCode::Forbidden));
    Ok(())
}

/// As an application: a token by one request to the authority, which the environment names.
async fn application(url: &str) -> Result {
    let credential = |secret: &str| -> Result<Arc<dyn TokenCredential>> {
        let (tenant, id) = (variable("CONFORMANCE_TENANT")?, variable("CONFORMANCE_CLIENT_ID")?);
        Ok(ClientSecretCredential::new(&tenant, id, Secret::new(secret.to_owned()), None)?)
    };
    let good = client(url, credential(&variable("CONFORMANCE_SECRET")?)?)?;
    let _: Vec<KeyProperties> = good.list_key_properties(None)?.try_collect().await?;
    assert_eq!(status(good.get_key("rust-life", None).await), Some(StatusCode::Forbidden));
    let bad = client(url, credential("wrong")?)?;
    let error = bad.get_key("rust-life", None).await.err().ok_or("a wrong secret got a token")?;
    assert!(format!("{error:?}").contains("AADSTS7000215"), "{error:?}");
    Ok(())
}

async fn managed_hsm(client: &KeyClient) -> Result {
    let made = create(client, "rust-aes", new_key(KeyType::OctHsm, 256)).await?;
    assert_eq!(made.key.as_ref().and_then(|key| key.kty.clone()), Some(KeyType::OctHsm));
    let version = made.resource_id()?.version.ok_or("the key has no version")?;
    let parameters = operation(EncryptionAlgorithm::A256Kw, vec![7; 32]);
    let wrapped = client.wrap_key("rust-aes", parameters.try_into()?, None).await?.into_model()?;
    let parameters =
        operation(EncryptionAlgorithm::A256Kw, wrapped.result.ok_or("nothing was wrapped")?);
    let opened = client
        .unwrap_key("rust-aes", &version, parameters.try_into()?, None)
        .await?
        .into_model()?;
    assert_eq!(opened.result, Some(vec![7; 32]));
    let parameters = GetRandomBytesParameters { count: Some(64) };
    let random = client.get_random_bytes(parameters.try_into()?, None).await?.into_model()?;
    assert_eq!(random.value.map(|bytes| bytes.len()), Some(64));
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result {
    let managed: Arc<dyn TokenCredential> = ManagedIdentityCredential::new(None)?;
    if std::env::args().nth(1).as_deref() == Some("mhsm") {
        managed_hsm(&client(&variable("CONFORMANCE_HSM")?, managed)?).await?;
        println!("a Managed HSM's keys and random bytes work");
        return Ok(());
    }
    let url = variable("CONFORMANCE_VAULT")?;
    let keys = client(&url, managed)?;
    life(&keys).await?;
    lists(&keys).await?;
    deletion(&keys).await?;
    rotation(&keys).await?;
    cryptography(&keys).await?;
    application(&url).await?;
    println!("life, lists, deletion, rotation, cryptography and credentials work");
    Ok(())
}
