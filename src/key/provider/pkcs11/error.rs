//! What a token's refusals mean: its rows of the table of conditions.
//!
//! A token that is away, busy or broken says nothing about the key. A key that is not in a token
//! that is there, a PIN that is not taken and an operation that is not permitted are its word.

use cryptoki::context::Function;
use cryptoki::error::{Error, RvError};

use super::super::{Class, ProviderError};
use crate::key::reason::Reason;

/// The code of a wrong PIN, which must not be tried again.
pub(super) const PIN_INCORRECT: &str = "CKR_PIN_INCORRECT";

/// For a call to the library that failed.
pub(super) fn classify(error: &Error) -> ProviderError {
    let Error::Pkcs11(code, function) = error else {
        return ProviderError::unreachable(error.to_string());
    };
    let mut classified = ProviderError::new(class_of(code), describe(*function, code));
    classified.code = Some(name(code));
    classified
}

fn class_of(code: &RvError) -> Class {
    use RvError as E;
    match code {
        // A token that fails over, or is just being written to, says so too: a second session tells.
        E::KeyHandleInvalid | E::ObjectHandleInvalid => Class::Denied(Reason::KeyNotFound),
        E::PinIncorrect
        | E::PinInvalid
        | E::PinLenRange
        | E::PinExpired
        | E::PinLocked
        | E::UserPinNotInitialized => Class::Denied(Reason::CredentialInvalid),
        E::KeyFunctionNotPermitted
        | E::ActionProhibited
        | E::FunctionRejected
        | E::UserNotLoggedIn
        | E::UserTypeInvalid => Class::Denied(Reason::PermissionRevoked),
        E::EncryptedDataInvalid
        | E::EncryptedDataLenRange
        | E::KeyTypeInconsistent
        | E::KeySizeRange
        | E::MechanismInvalid
        | E::MechanismParamInvalid
        | E::ArgumentsBad => Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
        E::TokenNotPresent | E::TokenNotRecognized | E::DeviceRemoved => {
            Class::Transient(Reason::VaultGone)
        }
        _ => Class::Transient(Reason::Unreachable),
    }
}

/// Whether the token does not know the parameters: another algorithm may do.
pub(super) fn is_unsupported(error: &ProviderError) -> bool {
    const CODES: [&str; 4] = [
        "CKR_ARGUMENTS_BAD",
        "CKR_MECHANISM_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
        "CKR_FUNCTION_NOT_SUPPORTED",
    ];
    error.code.as_deref().is_some_and(|code| CODES.contains(&code))
}

/// Some libraries have no better word for a ciphertext that is not the key's.
pub(super) fn is_vague(error: &ProviderError) -> bool {
    const CODES: [&str; 4] =
        ["CKR_GENERAL_ERROR", "CKR_FUNCTION_FAILED", "CKR_DATA_INVALID", "CKR_DATA_LEN_RANGE"];
    error.code.as_deref().is_some_and(|code| CODES.contains(&code))
}

fn describe(function: Function, code: &RvError) -> String {
    let what = match code {
        RvError::PinIncorrect => "the PIN is wrong; it is not tried again until its file changes",
        RvError::PinLocked => "the PIN is locked; the security officer can unlock it",
        RvError::PinExpired => "the PIN has expired; set a new one",
        RvError::TokenNotPresent | RvError::DeviceRemoved => "the token is not there",
        RvError::KeyFunctionNotPermitted => "the key may not be used for this",
        RvError::KeyHandleInvalid | RvError::ObjectHandleInvalid => "the key is not there any more",
        RvError::EncryptedDataInvalid | RvError::EncryptedDataLenRange => {
            "this was not wrapped with this key"
        }
        _ => "the token refuses",
    };
    format!("{what} (C_{function:?})")
}

/// As the standard writes it: `CKR_PIN_INCORRECT`.
fn name(code: &RvError) -> String {
    let camel = format!("{code:?}");
    let mut name = String::from("CKR");
    for letter in camel.chars() {
        if letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_rows_of_the_table() {
        use Class::{Denied, Transient};
        use RvError as E;
        let rows = [
            (E::KeyHandleInvalid, Denied(Reason::KeyNotFound), "CKR_KEY_HANDLE_INVALID"),
            (E::PinIncorrect, Denied(Reason::CredentialInvalid), PIN_INCORRECT),
            (E::PinLocked, Denied(Reason::CredentialInvalid), "CKR_PIN_LOCKED"),
            (
                E::KeyFunctionNotPermitted,
                Denied(Reason::PermissionRevoked),
                "CKR_KEY_FUNCTION_NOT_PERMITTED",
            ),
            (
                E::EncryptedDataInvalid,
                Denied(Reason::WrongKeyOrCorruptEnvelope),
                "CKR_ENCRYPTED_DATA_INVALID",
            ),
            (E::DeviceRemoved, Transient(Reason::VaultGone), "CKR_DEVICE_REMOVED"),
            (E::TokenNotPresent, Transient(Reason::VaultGone), "CKR_TOKEN_NOT_PRESENT"),
            (E::DeviceError, Transient(Reason::Unreachable), "CKR_DEVICE_ERROR"),
            (E::SessionCount, Transient(Reason::Unreachable), "CKR_SESSION_COUNT"),
            (E::GeneralError, Transient(Reason::Unreachable), "CKR_GENERAL_ERROR"),
        ];
        for (code, class, name) in rows {
            let error = classify(&Error::Pkcs11(code, Function::Decrypt));
            assert_eq!((error.class, error.code.as_deref()), (class, Some(name)));
            assert!(error.to_string().contains("C_Decrypt"), "{error}");
        }
        assert_eq!(classify(&Error::NotSupported).class, Transient(Reason::Unreachable));
    }
}
