//! The message to sign: its text, exactly as the caller sent it, and the digest that identifies it.

use std::fmt;

use ring::digest::{SHA256, digest};
use uuid::Uuid;

use crate::secret::Secret;

/// The largest number of bytes that a message can be allowed to have. It becomes part of the address of a call, where each byte takes up to
/// three; HTTP clients and servers accept less than 64 KB (`http::Uri`: 65,534 bytes).
pub const LONGEST: u32 = 16_384;

/// A message, kept byte for byte. `Debug` does not print it: its content is the caller's business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    text: Secret<String>,
    digest: MessageDigest,
}

impl Message {
    /// Creates a message from `text`, without trimming or normalisation.
    #[must_use]
    pub fn new(text: String) -> Self {
        let digest = MessageDigest::of(text.as_bytes());
        Self { text: Secret::new(text), digest }
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.text.expose()
    }

    /// The SHA-256 of the text.
    #[must_use]
    pub fn digest(&self) -> MessageDigest {
        self.digest
    }
}

/// The SHA-256 of a message, which identifies it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageDigest([u8; 32]);

impl MessageDigest {
    fn of(bytes: &[u8]) -> Self {
        Self(sha256(&[bytes]))
    }

    /// The bytes of the digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 128 bits, by which the store finds a message. An index on them is half as large as one on the whole digest. Two messages
    /// that agree in these bits are told apart by their text.
    pub(crate) fn short(self) -> Uuid {
        Uuid::from_slice(&self.0[..16]).expect("a digest has 32 bytes")
    }

    /// The first 64 bits. They are enough to tell waiters apart in a notification, whose payload is short. A collision only wakes a waiter
    /// in vain.
    #[must_use]
    pub fn hint(self) -> u64 {
        u64::from_be_bytes(self.0[..8].try_into().expect("a digest has 32 bytes"))
    }
}

impl TryFrom<Vec<u8>> for MessageDigest {
    type Error = std::array::TryFromSliceError;

    fn try_from(bytes: Vec<u8>) -> Result<Self, Self::Error> {
        bytes.as_slice().try_into().map(Self)
    }
}

impl fmt::Debug for MessageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}…", self.hint())
    }
}

/// SHA-256 over `parts`, each preceded by its length, so that different lists of parts never give the same input.
#[must_use]
pub fn digest_of_parts(parts: &[&[u8]]) -> [u8; 32] {
    let lengths: Vec<[u8; 8]> = parts.iter().map(|part| (part.len() as u64).to_be_bytes()).collect();
    let framed: Vec<&[u8]> = lengths.iter().zip(parts).flat_map(|(length, part)| [&length[..], part]).collect();
    sha256(&framed)
}

/// SHA-256 over the concatenation of `parts`.
#[must_use]
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let hashed = match parts {
        [one] => digest(&SHA256, one),
        many => {
            let mut context = ring::digest::Context::new(&SHA256);
            for part in many {
                context.update(part);
            }
            context.finish()
        }
    };
    hashed.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_keeps_its_bytes_and_does_not_print_them() {
        let message = Message::new(" a\n+%&🦀\0".to_owned());
        assert_eq!(message.text(), " a\n+%&🦀\0");
        assert!(!format!("{message:?}").contains('🦀'));
    }

    #[test]
    fn parts_that_concatenate_alike_have_different_digests() {
        assert_ne!(digest_of_parts(&[b"ab", b"c"]), digest_of_parts(&[b"a", b"bc"]));
        assert_ne!(digest_of_parts(&[b"a"]), digest_of_parts(&[b"a", b""]));
    }
}
