// swift-tools-version: 6.2
import PackageDescription

let strict: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .treatAllWarnings(as: .error),
    // `RawSpan` slices that outlive one expression need lifetime annotations, still behind a flag.
    .enableExperimentalFeature("Lifetimes"),
]

// Tests compile twice as fast without optimization; helpers that compute much are in MemoryImages.
let quick = strict + [.unsafeFlags(["-Onone"])]

let package = Package(
    name: "swimg",
    products: [
        .executable(name: "swimg", targets: ["swimg"]),
        .library(
            name: "ImageConvert",
            targets: [
                "ImageConvert", "ImageDrivers", "ImageFormats", "ImageioStorage",
                "HTTPStorage", "NBDStorage", "Decompression", "ImageStorage", "Concurrency",
                "DiskImage",
            ]),
        .library(name: "ImageTools", targets: ["ImageTools"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0")
    ],
    targets: [
        .executableTarget(
            name: "swimg",
            dependencies: [
                "ImageTools", "ImageConvert", "ImageDrivers", "ImageFormats", "HTTPStorage",
                "NBDStorage", "ImageStorage", "Concurrency", "DiskImage", "CLinux",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: strict),
        .target(
            name: "ImageTools",
            dependencies: [
                "ImageConvert", "ImageDrivers", "ImageFormats", "ImageStorage", "Concurrency",
                "DiskImage",
            ],
            swiftSettings: strict),
        .target(
            name: "ImageConvert",
            dependencies: [
                "ImageDrivers", "ImageFormats", "ImageStorage", "Concurrency", "DiskImage",
                "CDigest",
            ],
            swiftSettings: strict),
        // The lists of formats and storages, and what opens images by them.
        .target(
            name: "ImageDrivers",
            dependencies: [
                "ImageFormats", "ImageioStorage", "HTTPStorage", "NBDStorage", "Decompression",
                "ImageStorage", "Concurrency", "DiskImage",
            ],
            swiftSettings: strict),
        .target(
            name: "Decompression",
            dependencies: ["ImageStorage", "DiskImage", "CXZ", "CBZip2", "CISAL", "CZstd"],
            swiftSettings: strict),
        .target(
            name: "ImageFormats",
            dependencies: [
                "ImageStorage", "Concurrency",
                "DiskImage", "CZlib", "CZstd", "CDeflate", "CISAL", "CGcrypt",
            ],
            swiftSettings: strict),
        .target(
            name: "ImageStorage", dependencies: ["Concurrency", "DiskImage", "CLinux"],
            swiftSettings: strict),
        .target(
            name: "Concurrency", dependencies: ["DiskImage", "CLinux"], swiftSettings: strict),
        .target(
            name: "NBDStorage",
            dependencies: [
                "ImageStorage", "Concurrency",
                "DiskImage", "CNBD", "CLinux",
            ],
            swiftSettings: strict),
        .target(
            name: "HTTPStorage",
            dependencies: ["ImageStorage", "Concurrency", "DiskImage", "CCurl"],
            swiftSettings: strict),
        .target(
            name: "ImageioStorage",
            dependencies: ["HTTPStorage", "ImageStorage", "Concurrency", "DiskImage"],
            swiftSettings: strict),
        .target(name: "DiskImage", swiftSettings: strict),
        .target(name: "CLinux"),
        .target(name: "CNBD"),
        .target(name: "CCurl"),
        .target(name: "CXZ"),
        .target(name: "CBZip2"),
        .target(name: "CDigest"),
        .target(name: "CGcrypt"),
        .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(
            name: "CDeflate", pkgConfig: "libdeflate", providers: [.apt(["libdeflate-dev"])]),
        .systemLibrary(name: "CISAL", pkgConfig: "libisal", providers: [.apt(["libisal-dev"])]),
        // Guest disks and storage in memory, for tests.
        .target(
            name: "MemoryImages", dependencies: ["DiskImage", "ImageStorage", "Concurrency"],
            path: "Tests/MemoryImages", swiftSettings: strict),
        .testTarget(name: "DiskImageTests", dependencies: ["DiskImage"], swiftSettings: quick),
        .testTarget(
            name: "ConcurrencyTests", dependencies: ["Concurrency"], swiftSettings: quick),
        .testTarget(
            name: "ImageStorageTests", dependencies: ["ImageStorage", "CLinux"],
            swiftSettings: quick),
        .testTarget(name: "NBDStorageTests", dependencies: ["NBDStorage"], swiftSettings: quick),
        .testTarget(
            name: "ImageioStorageTests", dependencies: ["ImageioStorage"], swiftSettings: quick),
        .testTarget(name: "HTTPStorageTests", dependencies: ["HTTPStorage"], swiftSettings: quick),
        .testTarget(
            name: "ImageFormatsTests", dependencies: ["ImageFormats", "MemoryImages", "CZlib"],
            swiftSettings: quick),
        .testTarget(
            name: "ImageDriversTests", dependencies: ["ImageDrivers"], swiftSettings: quick),
        .testTarget(
            name: "ImageConvertTests", dependencies: ["ImageConvert", "MemoryImages"],
            swiftSettings: quick),
        // End to end, on the built program.
        .target(name: "TestSupport", path: "Tests/TestSupport", swiftSettings: strict),
        .testTarget(
            name: "IntegrationTests", dependencies: ["swimg", "TestSupport"],
            swiftSettings: quick),
        // Against qemu-img: conversions and questions, and the verbs that make or change images.
        .testTarget(
            name: "OracleTests", dependencies: ["swimg", "TestSupport"], swiftSettings: quick),
        .testTarget(
            name: "InPlaceTests",
            dependencies: [
                "swimg", "TestSupport", "MemoryImages", "ImageStorage", "ImageFormats",
                "ImageConvert",
            ],
            swiftSettings: quick),
    ]
)
