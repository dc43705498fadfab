//! The element types of tensors: their names in the KServe v2 protocol, their numbers in
//! `config.pbtxt` and in Triton's C interface, and their sizes.

use std::fmt;

/// The element type of a [`Tensor`](crate::tensor::Tensor), in the order of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
    Bytes,
    Bf16,
}

/// How the bytes of an element encode its value, always in little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// One byte: 0 is false.
    Bool,
    Unsigned,
    /// Two's complement.
    Signed,
    /// IEEE 754, or its upper half in the case of BF16.
    Float,
    /// A length of 4 bytes, then as many bytes of text.
    Text,
}

/// One row per type: type, name, encoding, and bytes of an element unless these differ. The rows
/// are in the order of [`DataType`], which is the order of the numbers from 1.
const TYPES: [(DataType, &str, Encoding, Option<usize>); 14] = [
    (DataType::Bool, "BOOL", Encoding::Bool, Some(1)),
    (DataType::Uint8, "UINT8", Encoding::Unsigned, Some(1)),
    (DataType::Uint16, "UINT16", Encoding::Unsigned, Some(2)),
    (DataType::Uint32, "UINT32", Encoding::Unsigned, Some(4)),
    (DataType::Uint64, "UINT64", Encoding::Unsigned, Some(8)),
    (DataType::Int8, "INT8", Encoding::Signed, Some(1)),
    (DataType::Int16, "INT16", Encoding::Signed, Some(2)),
    (DataType::Int32, "INT32", Encoding::Signed, Some(4)),
    (DataType::Int64, "INT64", Encoding::Signed, Some(8)),
    (DataType::Fp16, "FP16", Encoding::Float, Some(2)),
    (DataType::Fp32, "FP32", Encoding::Float, Some(4)),
    (DataType::Fp64, "FP64", Encoding::Float, Some(8)),
    (DataType::Bytes, "BYTES", Encoding::Text, None),
    (DataType::Bf16, "BF16", Encoding::Float, Some(2)),
];

impl DataType {
    pub fn all() -> impl Iterator<Item = Self> {
        TYPES.iter().map(|(datatype, ..)| *datatype)
    }

    /// The name in the KServe v2 protocol.
    pub fn name(self) -> &'static str {
        TYPES[self as usize].1
    }

    /// The type of this name in the KServe v2 protocol.
    pub fn parse(name: &str) -> Option<Self> {
        Self::all().find(|datatype| datatype.name() == name)
    }

    /// All names, for messages.
    pub fn names() -> String {
        TYPES.map(|(_, name, ..)| name).join(", ")
    }

    /// The number in `config.pbtxt` and in Triton's C interface; 0 is an invalid type.
    pub fn number(self) -> i32 {
        self as i32 + 1
    }

    /// The type of this number in `config.pbtxt` and in Triton's C interface.
    pub fn from_number(number: i32) -> Option<Self> {
        let row = usize::try_from(number).ok()?.checked_sub(1)?;
        TYPES.get(row).map(|(datatype, ..)| *datatype)
    }

    pub fn encoding(self) -> Encoding {
        TYPES[self as usize].2
    }

    /// Bytes of an element; `None` for [`DataType::Bytes`], whose elements differ in length.
    pub fn size(self) -> Option<usize> {
        TYPES[self as usize].3
    }

    /// Appends the bytes of an integer to `data`; `None` where the type has no such element.
    pub fn push_integer(self, value: i128, data: &mut Vec<u8>) -> Option<()> {
        let size = self.size()?;
        let n_bits = 8 * size;
        let range = match self.encoding() {
            Encoding::Signed => -(1 << (n_bits - 1))..1 << (n_bits - 1),
            Encoding::Unsigned => 0..1 << n_bits,
            _ => return None,
        };
        if !range.contains(&value) {
            return None;
        }
        data.extend_from_slice(&value.to_le_bytes()[..size]);
        Some(())
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_the_order_of_the_types() {
        for (row, (datatype, name, ..)) in TYPES.into_iter().enumerate() {
            assert_eq!(datatype as usize, row, "{name}");
            assert_eq!(DataType::from_number(datatype.number()), Some(datatype));
            assert_eq!(DataType::parse(name), Some(datatype));
        }
        assert!([i32::MIN, -1, 0, 15].map(DataType::from_number).iter().all(Option::is_none));
    }

    #[test]
    fn integers_fit_their_type_or_are_refused() {
        let pushed = |datatype: DataType, value: i128| {
            let mut data = Vec::new();
            datatype.push_integer(value, &mut data).map(|()| data)
        };
        assert_eq!(pushed(DataType::Int8, -128), Some(vec![0x80]));
        assert_eq!(pushed(DataType::Int16, -2), Some(vec![0xfe, 0xff]));
        assert_eq!(pushed(DataType::Uint8, 255), Some(vec![0xff]));
        assert_eq!(pushed(DataType::Uint64, u64::MAX.into()), Some(vec![0xff; 8]));
        assert_eq!(pushed(DataType::Int64, i64::MIN.into()), Some(i64::MIN.to_le_bytes().into()));
        for (datatype, value) in [
            (DataType::Int8, 128),
            (DataType::Int8, -129),
            (DataType::Uint8, -1),
            (DataType::Uint8, 256),
            (DataType::Int64, i128::from(u64::MAX)),
            (DataType::Uint64, i128::from(u64::MAX) + 1),
            (DataType::Fp32, 1),
            (DataType::Bool, 1),
        ] {
            assert_eq!(pushed(datatype, value), None, "{value} as {datatype}");
        }
    }
}
