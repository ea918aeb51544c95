//! AES-128-XTS as RAFS uses it (blob format, section 9): each unit is one data unit of its own, all with the same key and
//! initialisation vector, with ciphertext stealing.

use aes::Aes128;
use aes::cipher::{Block, BlockDecrypt, BlockEncrypt, KeyInit};

use crate::chunk::Cipher;

const BLOCK: usize = 16;
/// Blocks decrypted side by side.
const BATCH: usize = 8;
/// A unit shorter than a block is padded to one, and this is appended.
const SHORT_MARK: [u8; 2] = [0x78, 0x90];

/// Decrypts a unit. `None` if it is shorter than a block, which no encrypted unit is.
pub(super) fn decrypt(cipher: &Cipher, unit: &[u8]) -> Option<Vec<u8>> {
    let (data_key, tweak_key) = cipher.key.split_first_chunk::<BLOCK>()?;
    let data = Aes128::new(data_key.into());
    let mut tweak = Block::<Aes128>::from(cipher.iv);
    Aes128::new_from_slice(tweak_key).ok()?.encrypt_block(&mut tweak);
    let mut tweak = u128::from_le_bytes(tweak.into());

    let mut plain = unit.to_vec();
    let partial = unit.len() % BLOCK;
    let stealing = if partial > 0 { BLOCK } else { 0 };
    let whole = unit.len().checked_sub(partial + stealing)?;
    let (bulk, tail) = plain.split_at_mut(whole);
    for batch in bulk.as_chunks_mut::<BLOCK>().0.chunks_mut(BATCH) {
        let mut blocks = [Block::<Aes128>::default(); BATCH];
        let first = tweak;
        for (block, bytes) in blocks.iter_mut().zip(batch.iter()) {
            *block = xor(*bytes, tweak).into();
            tweak = double(tweak);
        }
        let used = blocks.get_mut(..batch.len())?;
        data.decrypt_blocks(used);
        tweak = first;
        for (block, bytes) in used.iter().zip(batch) {
            *bytes = xor((*block).into(), tweak);
            tweak = double(tweak);
        }
    }
    if let Some((last, rest)) = tail.split_first_chunk_mut::<BLOCK>() {
        let one = |bytes: [u8; BLOCK], tweak| {
            let mut block = Block::<Aes128>::from(xor(bytes, tweak));
            data.decrypt_block(&mut block);
            xor(block.into(), tweak)
        };
        // The last whole block was encrypted after the partial one had stolen from it.
        let stolen = one(*last, double(tweak));
        let mut joined = stolen;
        for ((byte, joined), stolen) in rest.iter_mut().zip(&mut joined).zip(stolen) {
            *joined = std::mem::replace(byte, stolen);
        }
        *last = one(joined, tweak);
    }
    Some(unpad(plain))
}

/// Undoes the padding of short units.
fn unpad(mut plain: Vec<u8>) -> Vec<u8> {
    if let Ok(padded) = <&[u8; BLOCK + 2]>::try_from(plain.as_slice())
        && let [.., padding, a, b] = *padded
        && [a, b] == SHORT_MARK
        && usize::from(padding) < BLOCK
    {
        plain.truncate(BLOCK - usize::from(padding));
    }
    plain
}

fn xor(bytes: [u8; BLOCK], tweak: u128) -> [u8; BLOCK] {
    (u128::from_le_bytes(bytes) ^ tweak).to_le_bytes()
}

/// Multiplies by x in GF(2^128), as IEEE 1619 counts bits.
fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher(key: &str, iv: &str) -> Cipher {
        let (key, iv) = (hex::decode(key).unwrap(), hex::decode(iv).unwrap());
        Cipher {
            key: key.try_into().unwrap(),
            iv: iv.try_into().unwrap(),
        }
    }

    /// IEEE 1619-2007, annex B, vectors 1, 2, 4 (first block), 15 to 18.
    #[test]
    fn vectors_of_the_standard() {
        let stealing = (
            "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0bfbebdbcbbbab9b8b7b6b5b4b3b2b1b0",
            "9a785634120000000000000000000000",
        );
        let cases = [
            (
                (
                    "0000000000000000000000000000000000000000000000000000000000000000",
                    "00000000000000000000000000000000",
                ),
                "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e",
                "0000000000000000000000000000000000000000000000000000000000000000",
            ),
            (
                (
                    "1111111111111111111111111111111122222222222222222222222222222222",
                    "33333333330000000000000000000000",
                ),
                "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
                "4444444444444444444444444444444444444444444444444444444444444444",
            ),
            (
                stealing,
                "6c1625db4671522d3d7599601de7ca09ed",
                "000102030405060708090a0b0c0d0e0f10",
            ),
            (
                stealing,
                "d069444b7a7e0cab09e24447d24deb1fedbf",
                "000102030405060708090a0b0c0d0e0f1011",
            ),
            (
                stealing,
                "e5df1351c0544ba1350b3363cd8ef4beedbf9d",
                "000102030405060708090a0b0c0d0e0f101112",
            ),
            (
                stealing,
                "9d84c813f719aa2c7be3f66171c7c5c2edbf9dac",
                "000102030405060708090a0b0c0d0e0f10111213",
            ),
        ];
        for ((key, iv), encrypted, plain) in cases {
            let decrypted = decrypt(&cipher(key, iv), &hex::decode(encrypted).unwrap()).unwrap();
            assert_eq!(hex::encode(decrypted), plain);
        }
    }

    /// The plain definition, one block at a time.
    fn encrypt(cipher: &Cipher, plain: &[u8]) -> Vec<u8> {
        let data = Aes128::new_from_slice(&cipher.key[..16]).unwrap();
        let mut tweak = Block::<Aes128>::from(cipher.iv);
        Aes128::new_from_slice(&cipher.key[16..])
            .unwrap()
            .encrypt_block(&mut tweak);
        let mut tweak = u128::from_le_bytes(tweak.into());
        let mut out = Vec::new();
        for block in plain.chunks(16) {
            let mut bytes = block.to_vec();
            if block.len() < 16 {
                let stolen = out.split_off(out.len() - 16);
                bytes.extend_from_slice(&stolen[block.len()..]);
                out.extend([0; 16]);
                let at = out.len() - 16;
                let mut block2 = Block::<Aes128>::from(xor(bytes.try_into().unwrap(), tweak));
                data.encrypt_block(&mut block2);
                out[at..].copy_from_slice(&xor(block2.into(), tweak));
                out.extend_from_slice(&stolen[..block.len()]);
                break;
            }
            let mut one = Block::<Aes128>::from(xor(bytes.try_into().unwrap(), tweak));
            data.encrypt_block(&mut one);
            out.extend_from_slice(&xor(one.into(), tweak));
            tweak = double(tweak);
        }
        out
    }

    proptest::proptest! {
        #[test]
        fn what_was_encrypted_is_decrypted(size in 16usize..400, seed: [u8; 32], iv: [u8; 16]) {
            let cipher = Cipher { key: seed, iv };
            let plain: Vec<u8> = (0..size).map(|i| (i * 7) as u8).collect();
            proptest::prop_assert_eq!(decrypt(&cipher, &encrypt(&cipher, &plain)), Some(plain));
        }
    }

    #[test]
    fn short_units_lose_their_padding() {
        let cipher = Cipher {
            key: [1; 32],
            iv: [2; 16],
        };
        for size in 1..16usize {
            let plain: Vec<u8> = (0..size as u8).collect();
            let mut padded = plain.clone();
            padded.resize(16, 16 - size as u8);
            padded.extend(SHORT_MARK);
            assert_eq!(decrypt(&cipher, &encrypt(&cipher, &padded)), Some(plain));
        }
        assert_eq!(decrypt(&cipher, &[0; 15]), None);
    }
}
