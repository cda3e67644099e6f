// swift-tools-version: 6.2
import PackageDescription

let strict: [SwiftSetting] = [
    .swiftLanguageMode(.v6), .treatAllWarnings(as: .error),
    .enableExperimentalFeature("Lifetimes"),
]

// A package of its own: everything in it, swimg's libraries among it, is built with
// `-sanitize=fuzzer`, which counts the branches that an input reaches.
let package = Package(
    name: "Fuzz",
    dependencies: [.package(name: "swimg", path: "..")],
    targets: [
        .target(name: "CFuzzer"),
        .target(
            name: "FuzzSupport",
            dependencies: ["CFuzzer", .product(name: "ImageConvert", package: "swimg")],
            swiftSettings: strict),
    ]
        + ["FuzzHeader", "FuzzTables", "FuzzImage"].map {
            .executableTarget(name: $0, dependencies: ["FuzzSupport"], swiftSettings: strict)
        }
)
